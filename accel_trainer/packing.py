"""Examples one after the other in a single row, without padding, and where each of them stands.

Legend: b examples, t tokens of all of them together. `cu_seqlens` and `max_seqlen` are FlashAttention's names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

# Attention of examples this short (tokens of several together) costs less in one call with a mask than in several without;
# measured on 2 cores: 64 is the best of 32, 64, 128, 256.
SHORT = 64


@dataclass(frozen=True, eq=False)
class Packing:
    """Where the examples of a packed micro-batch stand."""

    lengths: tuple[int, ...]  # (b,) on the host, so that nobody waits for a device to learn them
    examples: Tensor  # (t,) int64, the example that each token belongs to
    positions: Tensor  # (t,) int32, its place in the example, from 0
    cu_seqlens: Tensor  # (b + 1,) int32, where each example starts, and where the last one ends

    @classmethod
    def of(cls, lengths: Sequence[int] | npt.NDArray[np.int64]) -> Packing:
        """The packing of examples of these lengths, on the CPU."""
        counts = np.asarray(lengths, dtype=np.int64)
        bounds = np.concatenate([[0], counts.cumsum()])
        examples = np.repeat(np.arange(len(counts)), counts)
        positions = np.arange(len(examples)) - bounds[examples]
        return cls(
            tuple(counts.tolist()),
            torch.from_numpy(examples),
            torch.from_numpy(positions.astype(np.int32)),
            torch.from_numpy(bounds.astype(np.int32)),
        )

    def apply(self, move: Callable[[Tensor], Tensor]) -> Packing:
        """The same packing with its tensors moved."""
        return Packing(self.lengths, move(self.examples), move(self.positions), move(self.cu_seqlens))

    @property
    def max_seqlen(self) -> int:
        """Tokens of the longest example."""
        return max(self.lengths)

    @cached_property
    def starts(self) -> Tensor:
        """First token of each example, (b,) int64."""
        return self.cu_seqlens[:-1].long()

    @cached_property
    def mask(self) -> Tensor:
        """Which places of the padded examples hold a token, (b, longest) bool."""
        places = torch.arange(self.max_seqlen, device=self.cu_seqlens.device)
        return places < self.cu_seqlens.diff().unsqueeze(-1)

    @cached_property
    def _places(self) -> Tensor:
        return self.examples * self.max_seqlen + self.positions

    def pad(self, x: Tensor) -> Tensor:
        """Each example in a row of its own, zeros after it: (1, t, …) → (b, longest, …)."""
        padded = x.new_zeros(len(self.lengths) * self.max_seqlen, *x.shape[2:])
        return padded.index_copy(0, self._places, x[0]).view(len(self.lengths), self.max_seqlen, *x.shape[2:])

    def unpad(self, x: Tensor) -> Tensor:
        """The inverse of `pad`: (b, longest, …) → (1, t, …)."""
        return x.flatten(0, 1).index_select(0, self._places).unsqueeze(0)

    def is_row(self, x: Tensor) -> bool:
        """Whether `x` (1, t, …, features) holds all tokens in a row, and not one example."""
        return x.dim() > 2 and x.shape[:2] == (1, len(self.examples))

    @cached_property
    def short(self) -> list[int]:
        """Numbers of neighbouring examples whose attention is computed in one call: together within `SHORT` tokens, or 1."""
        counts: list[int] = []
        tokens = 0
        for length in self.lengths:
            if counts and tokens + length <= SHORT:
                counts[-1] += 1
                tokens += length
            else:
                counts.append(1)
                tokens = length
        return counts

    @cached_property
    def alike(self) -> list[int]:
        """Numbers of neighbouring examples of like length, which waste little when they are padded together."""
        counts: list[int] = []
        longest = 0
        for length in self.lengths:
            if counts and length <= longest and (4 * length >= 3 * longest or longest <= SHORT // 2):
                counts[-1] += 1
            else:
                counts.append(1)
                longest = length
        return counts

    @cached_property
    def short_tokens(self) -> list[int]:
        """Tokens of the examples that are `short` together."""
        return self.tokens_of(self.short)

    def tokens_of(self, counts: Sequence[int]) -> list[int]:
        """Tokens of so many neighbouring examples at a time."""
        bounds = np.concatenate([[0], np.cumsum(self.lengths)])[np.concatenate([[0], np.cumsum(counts)])]
        return np.diff(bounds).tolist()  # type: ignore[no-any-return]

    @cached_property
    def groups(self) -> list[Packing]:
        """Packings of the neighbours that are `alike`, cut out where they lie, since a copy would wait for the device."""
        found, example, token = [], 0, 0
        for count, tokens in zip(self.alike, self.tokens_of(self.alike), strict=True):
            last, end = example + count, token + tokens
            found.append(
                Packing(
                    self.lengths[example:last],
                    self.examples[token:end] - example,
                    self.positions[token:end],
                    self.cu_seqlens[example : last + 1] - token,
                )
            )
            example, token = last, end
        return found

    @cached_property
    def _masks(self) -> dict[tuple[int | None, bool, torch.dtype], list[Tensor | None]]:
        return {}

    def masks(self, window: int | None, *, first_only: bool, dtype: torch.dtype) -> list[Tensor | None]:
        """What is added to the scores of the examples that are `short` together, made once for all layers.

        Args:
            window: a token looks at others less than so many places away; None: at its whole example.
            first_only: of the queries, only the first of each example is there.
            dtype: of the scores.

        Returns:
            for each call (queries, keys), 0 or -inf; None where everything is visible.
        """
        key = window, first_only, dtype
        if key not in self._masks:
            sizes = self.short_tokens
            made: list[Tensor | None] = []
            for count, example, place in zip(
                self.short, self.examples.split(sizes), self.positions.split(sizes), strict=True
            ):
                if count == 1 and (window is None or len(place) <= window):
                    made.append(None)
                    continue
                queries = (place == 0).nonzero()[:, 0] if first_only else slice(None)
                visible = example[queries, None] == example
                if window is not None:
                    visible &= (place[queries, None] - place).abs() < window
                made.append(torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, -torch.inf))
            self._masks[key] = made
        return self._masks[key]
