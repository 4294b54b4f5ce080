"""What is written down of each layer: the rows of layers.csv."""

import math
from collections.abc import Iterator, Sequence

from attack.read.forecast import explain
from attack.walk.layer_solve import Record
from network.chain import index_of, parametrised
from network.embedding import PatchEmbedding
from network.stage import Chain
from update import checked

COLUMNS = (
    "layer", "positions", "rank_bound", "rank", "dimension", "gap", "spanned", "determined", "residual", "uncertainty",
    "seconds", "note",
)  # fmt: skip


class LayerRows:
    """A row of `COLUMNS` for every layer of a chain, with what is known of it without any measurement, and notes.

    Args:
        chain: the model's.
        image_shape: (C, H, W).
        batch_size: B.
        embedding: of a transformer, which then has a row too.
    """

    def __init__(
        self, chain: Chain, image_shape: Sequence[int], batch_size: int, embedding: PatchEmbedding | None = None
    ) -> None:
        known, self.chain, self.batch_size = ("layer", "positions", "rank_bound", "spanned"), chain, batch_size
        self._rows = {
            row["layer"]: dict.fromkeys(COLUMNS) | {name: row[name] for name in known} | {"seconds": 0.0, "note": ""}
            for row in explain(chain, image_shape, batch_size, embedding)
        }

    def __iter__(self) -> Iterator[dict]:
        return iter(self._rows.values())

    @property
    def is_spanned(self) -> bool:
        """Whether the gradient of a layer that was asked determines the space of its inputs."""
        return any(row["determined"] for row in self)

    def note(self, name: str, note: str, **facts: object) -> None:
        """Write a note on a layer beside those that it has, and facts in the place of others; seconds add up."""
        row = self._rows[name]
        notes = [row["note"], note] if row["note"] and row["note"] != note else [note]
        row |= facts | {"note": "; ".join(notes), "seconds": row["seconds"] + facts.get("seconds", 0.0)}

    def blur(self, forward: Sequence[float]) -> None:
        """Add the errors of the client's forward pass, by stage, to those of the layers that were asked."""
        for name, row in self._rows.items():
            if row["uncertainty"] is not None:
                row["uncertainty"] = math.hypot(row["uncertainty"], forward[index_of(self.chain, name)])

    def note_walk(self, record: Record, forward: Sequence[float]) -> None:
        """Write down what came of a stage on the walk; `forward` are the errors of the client's forward pass there."""
        noise, row = float(record.noise.max()) if len(record.noise) else None, self._row_of(record.name)
        if row is None:
            self.note(next(iter(self._rows)), record.reason)
            return
        if noise is not None:
            noise = math.hypot(noise, forward[index_of(self.chain, record.name)])
        weak = int(record.too_weak.sum())
        known = f"known from above, but {weak} are too weak" if weak else "known from above"
        self.note(
            row,
            record.reason or known,
            determined=record.determined,
            residual=None if math.isnan(record.residual) else record.residual,
            uncertainty=noise,
            seconds=record.seconds,
        )

    def _row_of(self, name: str) -> str | None:
        """The layer whose inputs the walk has sought at a stage: the first of a block, the one below a pool.

        None where no layer is left below.
        """
        if name in self._rows:
            return name
        index = index_of(self.chain, name)
        below = [stage.name for stage in parametrised(self.chain[:index])]
        inside = [stage.name for stage in parametrised([self.chain[index]])]  # of a block; none where it has no layers
        return next(iter(inside + below[-1:]), None)

    def why_not(self) -> str:
        """In a line, what came of each layer that was asked, and how many were not worth asking."""
        asked = [f"{row['layer']}: {row['note']}" for row in self if row["note"]]
        others = len(self._rows) - len(asked)
        if others:
            asked.append(f"{others} layers have too many positions or too few channels for {self.batch_size} images")
        return "; ".join(asked)


def restored_rows(rows: object) -> list[dict]:
    """The rows of layers.csv from a checkpoint: of each column a number, a text, or nothing."""
    found: list[dict] = []
    for row in checked.sequence(rows, "layers"):
        held = checked.mapping(row, "a row of layers", COLUMNS)
        if found and list(held) != list(found[0]):
            raise checked.DamagedError("the rows of layers differ in their columns")
        for name, value in held.items():
            if name in ("layer", "note"):
                checked.word(value, f"layers.{name}")
            elif value is not None and not isinstance(value, bool):
                checked.real(value, f"layers.{name}", finite=False)
        checked.real(held["seconds"], "layers.seconds", 0)
        found.append(dict(held))
    return found
