"""A strategy of Flower that fuses clients' networks of different width at the server. Needs: pip install flwr."""

from __future__ import annotations

from collections.abc import Iterable

from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from fuse_clients import TEST, TRAIN, fused_clients, loaded, trained
from torch import Tensor

from mergekit_ot import evaluate


class FuseClients(FedAvg):
    """Everything of FedAvg but the mean: replies are fused, so clients need no common start and no common width.

    Args:
        width: Of the server's network.
        inputs: Public inputs without labels, which the fused network is fitted on.
    """

    def __init__(self, width: int, inputs: Iterable[Tensor], **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        self.width, self.inputs = width, inputs

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Fuses what the clients sent; one round is enough, which is what one-shot federated learning means."""
        # A reply with an error has no content and is left out.
        contents = [reply.content for reply in replies if not reply.has_error()]
        if not contents:
            return None, None
        return self.fused(contents), self.train_metrics_aggr_fn(contents, self.weighted_by_key)

    def fused(self, contents: list[RecordDict]) -> ArrayRecord:
        """Returns the fused network of what clients sent, where FedAvg takes the mean of arrays of one shape."""
        states = [each.array_records[self.arrayrecord_key].to_torch_state_dict() for each in contents]
        samples = [float(next(iter(each.metric_records.values()))[self.weighted_by_key]) for each in contents]
        return ArrayRecord(dict(fused_clients(states, samples, self.width, self.inputs).state))


def answer(number: int, epochs: int) -> RecordDict:
    """Trains a client, and returns what the train function of its ClientApp puts into the reply."""
    state, samples = trained(number, epochs)
    return RecordDict({"arrays": ArrayRecord(state), "metrics": MetricRecord({"num-examples": samples})})


def main(epochs: int = 30) -> dict[str, float]:
    """Fuses three clients in this process; a ServerApp calls FuseClients(...).start(grid, ...) in place of it."""
    strategy = FuseClients(48, [images for images, _ in TRAIN[9:]])
    arrays = strategy.fused([answer(number, epochs) for number in range(3)])
    return {"server": evaluate(loaded(arrays.to_torch_state_dict()), TEST).accuracy or 0.0}


if __name__ == "__main__":
    print(f"server           {main()['server']:5.1f} %")
