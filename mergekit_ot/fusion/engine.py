"""The engine: runs a plan step by step and puts the fused model together."""

from __future__ import annotations

import time
from dataclasses import replace

from mergekit_ot.fusion.function_check import AS_THEY_STAND
from mergekit_ot.fusion.fusion_run import FusionRun
from mergekit_ot.fusion.judging import judged
from mergekit_ot.fusion.networks import Deferred
from mergekit_ot.fusion.result import FusionResult
from mergekit_ot.fusion.setup import FusionSetup
from mergekit_ot.fusion.standing import averaged_as_they_stand
from mergekit_ot.progress import Progress
from mergekit_ot.storage.store import StoreWriter


def run_fusion(
    setup: FusionSetup, progress: Progress | None = None, dry_run: bool = False, writer: StoreWriter | None = None
) -> FusionResult:
    """Runs a checked fusion; a dry run plans and reads only, and its result holds no state.

    Args:
        setup: The fusion.
        progress: Called with (steps done, steps in all, what is done).
        dry_run: Whether to stop before anything is solved.
        writer: Takes the fused tensors as they are completed; they stay in memory where there is none.
    """
    started = time.perf_counter()
    if setup.needs_no_graph and not dry_run:
        return _averaged(setup, started, writer)
    run = FusionRun(setup, progress, writer)
    if dry_run:
        for source in setup.networks.sources:
            source.state.check_all()
    else:
        run.run()
    return FusionResult(
        state=run.fused,
        alignment=run.alignment,
        groups=tuple(run.reports.values()),
        aligned_sources_max_error=None if run.check is None or run.check.skipped else run.check.error,
        plan=run.plan,
        solver=setup.methods.solver.name,
        options=setup.options,
        seconds=time.perf_counter() - started,
        warnings=tuple(run.warnings()),
        target=setup.models.target if setup.models.is_changed or setup.options.untie else setup.networks.target,
        sources=setup.networks.sources,
        networks=setup.networks,
        objectives=run.objectives,
        notes=tuple(run.notes),
        extent=run.extent(),
        check=run.check,
        repair_comparison=run.comparison,
        alone=run.alone,
        deepened=setup.deepened,
    )


def _averaged(setup: FusionSetup, started: float, writer: StoreWriter | None) -> FusionResult:
    """Averages sources as they stand, without a trace; what only a graph tells is found when it is asked for."""
    state = averaged_as_they_stand(setup, writer)
    target, sources = setup.networks.target, setup.networks.sources
    comparison, notes = judged(setup, target, sources, state) if setup.held_out else (None, ())
    aligned = Deferred(lambda: FusionRun(replace(setup, observers=())).aligned_alone())
    return FusionResult(
        state=state,
        alignment=Deferred(lambda: aligned.value.alignment),
        groups=Deferred(lambda: tuple(aligned.value.reports.values())),
        aligned_sources_max_error=0.0,
        plan=Deferred(lambda: aligned.value.plan),
        solver=setup.methods.solver.name,
        options=setup.options,
        seconds=time.perf_counter() - started,
        warnings=() if comparison is None else comparison.warnings,
        target=target,
        sources=sources,
        networks=setup.networks,
        notes=(*setup.notes, *notes),
        extent=Deferred(lambda: aligned.value.extent()),
        check=AS_THEY_STAND,
        repair_comparison=comparison,
        deepened=setup.deepened,
    )
