"""The wire contract of a weight transfer: what is sent, in which order, cut into which buckets.

Invariant: learner and engine derive the same buckets from the same manifest, so the collectives
that they issue agree in order and size by construction. Checksums are taken over the bytes that
travel, before the engine fuses or transforms anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
import xxhash
from numpy.typing import NDArray

IN_FLIGHT = 4  # buckets that travel at once
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class ParameterSpec:
    """One tensor on the wire, e.g. ParameterSpec("model.norm.weight", (128,), "float32")."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # torch's name without "torch."

    @property
    def num_bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes [start, stop) of one parameter: all of it, or a part of one larger than a bucket."""

    spec: ParameterSpec
    start: int
    stop: int

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def num_bytes(self) -> int:
        return self.stop - self.start

    @property
    def ends(self) -> bool:
        """Whether the parameter is complete with this piece."""
        return self.stop == self.spec.num_bytes


@dataclass(frozen=True, slots=True)
class WeightManifest:
    """Ordered parameters and the bucket size they are packed into."""

    parameters: tuple[ParameterSpec, ...]
    bucket_bytes: int

    def buckets(self) -> list[list[Piece]]:
        """Consecutive parameters of at most `bucket_bytes`; a larger one is cut, so that neither
        side ever holds more than the buckets in flight beside the parameters."""
        buckets: list[list[Piece]] = []
        used = 0
        for spec in self.parameters:
            for start in range(0, spec.num_bytes, self.bucket_bytes):
                piece = Piece(spec, start, min(start + self.bucket_bytes, spec.num_bytes))
                if not buckets or used + piece.num_bytes > self.bucket_bytes:
                    buckets.append([])
                    used = 0
                buckets[-1].append(piece)
                used += piece.num_bytes
        return buckets

    @property
    def num_bytes(self) -> int:
        return sum(spec.num_bytes for spec in self.parameters)

    def difference(self, other: WeightManifest) -> str:
        """The first parameter that is another one in `other`, or nothing: "parameter 3: b.weight
        (40, 4) float32 against b.weight (40, 5) float32"."""
        for at, (ours, theirs) in enumerate(zip_longest(self.parameters, other.parameters)):
            if ours != theirs:
                return f"parameter {at}: {_words(ours)} against {_words(theirs)}"
        if self.bucket_bytes != other.bucket_bytes:
            return f"buckets of {self.bucket_bytes} bytes against {other.bucket_bytes}"
        return ""


def _words(spec: ParameterSpec | None) -> str:
    return f"{spec.name} {tuple(spec.shape)} {spec.dtype}" if spec else "none"


def checksum(data: NDArray[np.uint8]) -> int:
    """XXH3's upper 63 bits over a parameter's wire bytes (an int64 on the wire); equal on both
    sides or the update is refused. Against damage and mix-ups, not against an adversary; several
    times faster than the wire, where CRC-32 is as slow as it."""
    return xxhash.xxh3_64_intdigest(np.ascontiguousarray(data).data) >> 1


class Checksums:
    """Each parameter's checksum, taken from the buckets as they pass."""

    def __init__(self) -> None:
        self.values: list[int] = []  # of the parameters that are complete, in the manifest's order
        self._running = xxhash.xxh3_64()

    def add(self, bucket: Sequence[Piece], data: NDArray[np.uint8]) -> None:
        """`data`: the bucket's bytes, contiguous."""
        offset = 0
        for piece in bucket:
            self._running.update(data[offset : offset + piece.num_bytes].data)
            offset += piece.num_bytes
            if piece.ends:
                self.values.append(self._running.intdigest() >> 1)
                self._running.reset()


@dataclass(frozen=True, slots=True)
class TransferEpoch:
    """One membership of the communicator: learner rank 0 and the engines alive when it opened.

    Rank 0 is the learner; an engine with tensor parallel size t owns t consecutive ranks.
    """

    number: int
    backend: str  # "gloo" | "nccl"
    address: str  # host of the rendezvous store (on learner rank 0's node)
    port: int
    world_size: int
    rank_offsets: dict[str, int]  # rollout actor name -> its first rank
    deadline_s: float


def assign_ranks(members: Mapping[str, int]) -> tuple[dict[str, int], int]:
    """(first rank of each engine, world size) from each engine's number of ranks. The learner is
    rank 0, the engines' ranks follow without a gap: {"a": 1, "b": 2, "c": 1} starts them at 1, 2
    and 4 in a world of 5."""
    offsets, size = {}, 1
    for name, ranks in members.items():
        offsets[name] = size
        size += ranks
    return offsets, size
