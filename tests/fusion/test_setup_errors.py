"""What a user may get wrong in a fusion: one message that says what, why and what to do, before any work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from nets import Cnn, Mlp
from torch import Tensor, nn

from mergekit_ot import (
    AbstractBarycenterSolver,
    ArchitectureError,
    CheckpointError,
    DataError,
    FusionOptions,
    MergeotError,
    Permutation,
    RecipeError,
    SolverError,
    SourceModel,
    fuse,
)
from mergekit_ot.errors import GraphMismatchError

INPUTS = torch.randn(2, 6)


def models(count: int = 2) -> list[nn.Module]:
    return [Mlp() for _ in range(count)]


def assert_refused(error: type[MergeotError], match: str, sources: list[Any] | None = None, **options: Any) -> str:
    """Expects `fuse` to raise, and returns the message."""
    given = {"example_inputs": INPUTS, **options}
    with pytest.raises(error, match=match) as raised:
        fuse(models() if sources is None else sources, **given)
    message = str(raised.value)
    assert message.endswith((".", "?", ")"))
    return message


@pytest.mark.parametrize(
    ("options", "guess", "known"),
    [
        ({"solver": "weight-maching"}, "weight-matching", "otfusion"),
        ({"measure": "activation", "data": [INPUTS]}, "activations", "weights"),
        ({"repair": "resett", "data": [INPUTS]}, "reset", "reset"),
        ({"executor": "seriel"}, "serial", "serial"),
    ],
)
def test_an_unknown_name_is_guessed_and_all_are_listed(options: dict[str, Any], guess: str, known: str) -> None:
    message = assert_refused(RecipeError, rf"Did you mean '{guess}'\?", **options)
    assert known in message.split("Known: ")[1]


def test_a_name_like_nothing_is_not_guessed() -> None:
    assert "Did you mean" not in assert_refused(
        RecipeError, "Unknown solver 'zzz'. Known: activation-matching", solver="zzz"
    )


def test_an_unknown_solver_option_is_guessed() -> None:
    assert_refused(
        RecipeError,
        r"Unknown option of solver 'wb' 'epsilom'\. Did you mean 'epsilon'\?",
        solver_options={"epsilom": 1},
    )


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"max_steps": "many"}, "Option max_steps of solver 'wb' is 'many': a whole number, at least 1"),
        ({"max_steps": 1.5}, "Option max_steps of solver 'wb' is 1.5: a whole number, at least 1"),
        ({"max_steps": True}, "Option max_steps of solver 'wb' is True: a whole number"),
        ({"max_steps": 10**9}, "Option max_steps of solver 'wb' is 1000000000: a whole number, .* at most 1000000"),
        ({"epsilon": "-1"}, r"Option epsilon of solver 'wb' is -1\.0: a number, at least 0"),
        ({"epsilon": -1.0}, r"Option epsilon of solver 'wb' is -1\.0: a number, at least 0"),
        ({"epsilon": float("nan")}, "Option epsilon of solver 'wb' is nan: a number"),
        ({"epsilon": float("inf")}, "Option epsilon of solver 'wb' is inf: a number"),
        ({"epsilon": "nan"}, "Option epsilon of solver 'wb' is nan: a number"),
        ({"keep_apart": "false"}, "Option keep_apart of solver 'wb' is 'false': true or false"),
        ({"keep_apart": 2}, "Option keep_apart of solver 'wb' is 2: true or false"),
        ({"members": 3}, "Option members of solver 'wb' is 3: 'all' or 'first'"),
        ({"epsilon": None}, "Option epsilon of solver 'wb' is None: a number"),
    ],
)
def test_a_solver_option_that_does_not_fit_is_refused(options: dict[str, object], match: str) -> None:
    assert_refused(RecipeError, match, solver_options=options)


@pytest.mark.parametrize(
    ("weights", "match"),
    [
        ([1.0], "1 model weights for 2 models"),
        ([0.5, 0.25, 0.25], "3 model weights for 2 models"),
        ([1.5, -0.5], "must be non-negative and sum to one"),
        ([0.0, 0.0], "sum to one, not 0"),
        ([float("nan"), 1.0], "must be non-negative"),
        ([float("inf"), 0.0], "must be non-negative and sum to one"),
    ],
)
def test_wrong_model_weights_are_refused(weights: list[float], match: str) -> None:
    assert_refused(RecipeError, match, model_weights=weights)


def test_no_model_is_refused() -> None:
    assert_refused(RecipeError, "There is no model to fuse", [])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_source_that_is_not_finite_is_named_with_its_tensor(value: float) -> None:
    given = models()
    given[1].layers[1].bias.data[2] = value
    assert_refused(CheckpointError, r"'layers\.1\.bias' of source 1 holds NaN or infinity", given)


def other(make: Callable[[], nn.Module], state: dict[str, Tensor]) -> SourceModel:
    return SourceModel("other.pt", make, state)


def test_a_missing_key_is_named() -> None:
    state = Mlp().state_dict()
    del state["layers.1.weight"], state["layers.2.bias"]
    assert_refused(
        ArchitectureError, r"other\.pt .*'layers\.1\.weight' is missing \(and 1 more", [Mlp(), other(Mlp, state)]
    )


def test_a_surplus_key_is_named() -> None:
    state = {**Mlp().state_dict(), "extra": torch.zeros(1)}
    assert_refused(ArchitectureError, "'extra' is not part of the architecture", [Mlp(), other(Mlp, state)])


def test_a_tensor_of_another_shape_is_named_with_both_shapes() -> None:
    state = Mlp((6, 8, 7, 3)).state_dict()
    assert_refused(
        ArchitectureError,
        r"'layers\.1\.weight' has shape \(7, 8\), the architecture has \(5, 8\)",
        [Mlp(), other(Mlp, state)],
    )


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (
            lambda: Mlp((6, 8, 3)),
            r"depth differs: source 0 has 3 layers of 'layers' and source 1 has 2\..*'layers\.2\.weight' of source 0",
        ),
        (lambda: Mlp((6, 8, 5, 4, 3)), r"depth differs: source 0 has 3 layers of 'layers' and source 1 has 4\."),
        (lambda: Mlp(bias=False), r"Parameter 'layers\.0\.bias' of source 0 does not exist in source 1"),
    ],
)
def test_mismatched_architectures_name_the_first_parameter_that_differs(
    make: Callable[[], nn.Module], match: str
) -> None:
    message = assert_refused(GraphMismatchError, match, [Mlp(), make()])
    assert "--arch" in message


def test_heads_of_different_classes_are_told_as_such() -> None:
    match = r"heads have 3 and 4 classes \(outputs\) in source 0 and source 1 \('layers\.2\.weight', axis 0\)"
    message = assert_refused(GraphMismatchError, match, [Mlp(), Mlp((6, 8, 5, 4))])
    assert "--keep 'layers.2.*'" in message
    assert "--head both" in message


def test_parameters_that_only_the_other_source_has_are_named() -> None:
    with_bias, without = Mlp(), Mlp(bias=False)
    assert_refused(
        GraphMismatchError, r"Parameter 'layers\.0\.bias' of source 1 does not exist in source 0", [without, with_bias]
    )


def test_an_axis_that_cannot_be_resized_says_why() -> None:
    assert_refused(GraphMismatchError, r"It cannot be resized: model output", [Mlp(), Mlp((6, 8, 5, 4))])


@pytest.mark.parametrize(
    ("options", "who"),
    [
        ({"solver": "activation-matching"}, "measure 'activations'"),
        ({"measure": "correlations"}, "measure 'correlations'"),
        ({"repair": "reset"}, "repair 'reset'"),
    ],
)
def test_what_needs_data_asks_for_it(options: dict[str, Any], who: str) -> None:
    message = assert_refused(DataError, f"{who} needs calibration data", **options)
    assert "--data" in message


@pytest.mark.parametrize("target", [2, -1, 7])
def test_a_target_out_of_range_is_refused(target: int) -> None:
    assert_refused(RecipeError, rf"Target {target} is not one of the 2 models \(counted from 0\)", target=target)


def test_a_target_without_neurons_is_refused() -> None:
    with pytest.warns(UserWarning, match="zero-element"):
        target = Mlp((6, 0, 5, 3))
    assert_refused(MergeotError, r"Group 'layers\.0\.weight:0' of the target has no neurons", target=target)


def test_a_target_of_another_architecture_is_named() -> None:
    assert_refused(GraphMismatchError, "the target", target=Mlp((6, 8, 3)))


def test_missing_example_inputs_are_asked_for() -> None:
    message = assert_refused(ArchitectureError, "traced at example inputs, and none are known", example_inputs=None)
    assert "--input-shape" in message


def test_example_inputs_of_the_wrong_shape_are_told_with_the_shape() -> None:
    assert_refused(ArchitectureError, r"'Mlp' cannot be traced at inputs \(2, 9\)", example_inputs=torch.randn(2, 9))


def test_averaging_unequal_sizes_names_the_group_and_another_solver() -> None:
    message = assert_refused(
        SolverError,
        r"group 'layers\.0\.weight:0' has sizes \[8, 9\] for a fused size of 8",
        [Mlp(), Mlp((6, 9, 5, 3))],
        solver="average",
    )
    assert "'wb'" in message


def test_a_solver_that_returns_couplings_of_other_sizes_is_blamed() -> None:
    class Broken(AbstractBarycenterSolver):
        name = "broken"

        def find(self, problem):
            return (Permutation.identity(3),) * 2

    message = assert_refused(
        SolverError, r"Solver 'broken' returned couplings of sizes \[\(3, 3\), \(3, 3\)\]", solver=Broken()
    )
    assert "check_solver" in message


@pytest.mark.parametrize("error_first", ["solver", "weights", "nan"])
def test_nothing_heavy_runs_before_a_mistake_is_told(monkeypatch: pytest.MonkeyPatch, error_first: str) -> None:
    def traced(*args: object, **options: object) -> None:
        raise AssertionError("a model was traced before the mistake was told")

    monkeypatch.setattr("mergekit_ot.api.trace_model", traced)
    broken = Cnn()
    broken.fc1.weight.data[0, 0] = float("nan")
    inputs = torch.randn(2, 1, 8, 8)
    if error_first == "solver":
        assert_refused(RecipeError, "Unknown solver", [Cnn(), Cnn()], solver="nope", example_inputs=inputs)
    elif error_first == "weights":
        assert_refused(RecipeError, "model weights", [Cnn(), Cnn()], model_weights=[1.0], example_inputs=inputs)
    else:
        assert_refused(CheckpointError, "NaN", [Cnn(), broken], example_inputs=inputs)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"seed": 1.5}, "seed=1.5: input should be a valid integer"),
        ({"seed": "1"}, "seed='1': input should be a valid integer"),
        ({"seed": True}, "seed=True: input should be a valid integer"),
        ({"seed": -1}, "seed=-1: it is a number from 0"),
        ({"seed": 2**63}, "seed=9223372036854775808: it is a number from 0"),
        ({"restarts": True}, "restarts=True: input should be a valid integer"),
        ({"restarts": 10**9}, "restarts=1000000000: input should be less than or equal to 1000"),
        ({"calibration_size": 0}, "calibration_size=0: input should be greater than or equal to 1"),
        ({"calibration_size": float("nan")}, "calibration_size=nan: input should be"),
        ({"device": 3}, "device=3: input should be a valid string"),
        ({"device": "tpu"}, "Device 'tpu' cannot be used: RuntimeError: .* Take auto, cpu or cuda"),
        ({"refine": "false"}, "refine='false': input should be a valid boolean"),
        ({"measure": 3}, "measure=3: input should be a valid string"),
        ({"model_weights": "0.5,0.5"}, "model_weights='0.5,0.5': input should be a valid tuple"),
        ({"model_weights": ["0.5", "0.5"]}, r"model_weights=.*: input should be a valid number"),
        ({"model_weights": [True, False]}, r"model_weights=.*: input should be a valid number"),
        ({"model_weights": 0.5}, "model_weights=0.5: input should be a valid tuple"),
        ({"solver_options": [("epsilon", 0)]}, "solver_options=.*: input should be a valid dictionary"),
    ],
)
def test_an_option_of_another_type_or_out_of_range_is_refused(options: dict[str, object], match: str) -> None:
    assert_refused(RecipeError, match, **options)


def test_numbers_of_other_libraries_are_numbers() -> None:
    options = FusionOptions(seed=np.int64(3), model_weights=torch.tensor([0.25, 0.75]))  # type: ignore[arg-type]
    assert (options.seed, options.model_weights) == (3, (0.25, 0.75))
    assert type(options.seed) is int


@pytest.mark.parametrize("source", ["a.pt", Mlp().state_dict()], ids=["a path", "a state"])
def test_a_source_that_is_no_module(source: object) -> None:
    message = assert_refused(ArchitectureError, "source 1 is a", [Mlp(), source])
    assert "Pass the module" in message
    assert "mergeot fuse" in message
