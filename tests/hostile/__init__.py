"""Files and recipes made to break a reader: each kind is a case with what the one message must name."""

from __future__ import annotations

from hostile.arrays import ARRAYS
from hostile.arrays_as_models import ARRAYS_AS_MODELS
from hostile.case import Case
from hostile.described import DESCRIBED
from hostile.headers import HEADERS
from hostile.places import PLACES
from hostile.recipes import RECIPES
from hostile.torch_files import TORCH_FILES

CASES: list[Case] = [*TORCH_FILES, *DESCRIBED, *HEADERS, *ARRAYS, *ARRAYS_AS_MODELS, *RECIPES, *PLACES]
