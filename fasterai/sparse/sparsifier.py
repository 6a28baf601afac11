"""Zeros in the weights of a network, for any training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from ..core.criteria import Criterion, Lookup, as_criterion, large_final
from ..core.former import explain_former
from ..core.granularity import Granularity, maskable
from ..core.masks import Limits, apply_masks, as_context, choose_cuts, zero_marks
from ..core.names import LayerChoice, frozen_of, plain, unknown_name, unwrapped
from ..core.processes import Processes, refuse_sharded
from ..core.ranking import ElementRanking, Ranking, ScoreRanking
from ..core.records import Records, refuse_equal, stand_in
from ..core.selection import Cutoff
from ..coupling.labels import NORMALISED
from ..coupling.ranking import require_scales
from ..coupling.units import FROZEN
from ..measure.profile import macs
from .choose import choose
from .groups import UnitGroups, ranking_of, write_cut
from .regrow import Regrowth
from .report import sparsity_report
from .targets import origin, targets_of

__all__ = ["Sparsifier"]

Sparsity = float | Mapping[str, float]

_FILTERS_STAY = (
    "filters cannot come back: with a filter, its bias and its norm's scale and shift at zero, no "
    "gradient passes a ReLU behind them, so they would stay zero for ever. Use granularity "
    "'weight', 'row', 'column' or 'kernel', or a schedule that does not go down, such as agp"
)
_PATTERNS_STAY = (
    "an N:M pattern only fills up: take a schedule that does not go down, such as agp, or let "
    "single weights come back with granularity 'weight'"
)


class Sparsifier:
    """Zeroes exactly the asked share of a network's groups and keeps them at zero.

    ```python
    sparsifier = Sparsifier(model, 'filter', example_inputs=x)
    sparsifier.sparsify_model(0.5)       # now
    for xb, yb in batches:
        ...
        optimizer.step()
        sparsifier.apply()               # after each step
    ```
    Zeros that the model already has stay zero. Nothing is attached to the model.

    Args:
        model: any network. One that `torch.compile` or `DistributedDataParallel` wraps goes by the
            names inside, without `_orig_mod.` and `module.`. Where several processes train, all
            make one of the wrapped model and call it alike: the first one's masks hold for all.
        granularity: which weights go together: 'weight', 'row', 'column', 'kernel', 'filter', ...,
            a set of dimensions such as 'o h', blocks such as 'o/16 i', or a pattern such as '2:4';
            see `Granularity`. 'filter' zeroes whole units, with their biases and the scales and
            shifts of their norms, together with the filters they are added to, so that `Pruner`
            can remove them.
        context: 'local' reaches the sparsity in each layer, 'global' over all of them.
        criteria: scores of weights, higher = keep. Where they compare with the initial weights,
            these are the ones at this moment; previous ones are those after the last
            `sparsify_model`. For both a copy is kept here, see `record_bytes`. Gradients are read
            when `sparsify_model` is called: between `loss.backward()` and `zero_grad()`.
        layers: names or types of the layers to sparsify, or names of blocks; default every conv,
            linear, recurrent and attention layer but the output layer, and those of types that were
            given to `register`. Embeddings must be asked for; their columns are filters, so that
            'filter' takes them unless they are excluded.
        exclude: names or types of layers to leave alone.
        min_keep: groups that stay in each layer, at least.
        round_to: the number of groups kept becomes a multiple of this.
        example_inputs: what the model's forward takes; 'filter' needs them, other granularities
            find the output layer with them. Default, where the first layer is a Conv2d, one
            random image of 64 x 64.
        mixed: 'filter' also zeroes channels that layer, RMS and group norms normalise together,
            such as the embedding width of a transformer. That changes the norms' statistics;
            `Pruner` then leaves norms that remember their width.
        whole_heads: attention heads are zeroed as a whole; else each becomes narrower. Where rotary
            embeddings couple the heads, or code fixes their number, they stay.
        regrow: let zeroed weights come back with `regrow_model`; needs a score (4 bytes) and a bool
            of memory for each group. Not for 'filter' and N:M patterns.

    Raises:
        ValueError: unknown names, a model with nothing to sparsify, or inputs it cannot run on.
    """

    @explain_former()
    def __init__(
        self,
        model: nn.Module,
        granularity: str = "weight",
        context: str = "local",
        criteria: Criterion | Callable[[Tensor], Tensor] = large_final,
        *,
        layers: LayerChoice | Iterable[LayerChoice] | None = None,
        exclude: LayerChoice | Iterable[LayerChoice] = (),
        min_keep: int = 1,
        round_to: int = 1,
        example_inputs: Any = None,
        mixed: bool = False,
        whole_heads: bool = False,
        regrow: bool = False,
    ) -> None:
        self.model = model
        self.granularity = Granularity(granularity)
        self.context = as_context(context)
        self.criteria = as_criterion(criteria)
        self.limits = Limits(min_keep, round_to)
        if regrow and self.granularity.is_filter:
            raise ValueError(_FILTERS_STAY)
        if regrow and self.granularity.pattern is not None:
            raise ValueError(_PATTERNS_STAY)
        self.asked: tuple[float, ...] | None = None
        self._network = network = unwrapped(model)
        refuse_sharded(network)
        self._processes = Processes(model)
        choice = choose(
            network, self.granularity, layers, exclude, example_inputs, mixed, whole_heads
        )
        self._groups, self._inputs = choice.groups, choice.inputs
        self.skipped, self.frozen_share = choice.skipped, choice.frozen_share
        units = [g for g in self._groups if isinstance(g, UnitGroups)]
        require_scales(dict(network.named_parameters()), [g.axis for g in units], self.criteria)
        covered = {k: p for g in self._groups for k, p in g.parameters.items()}
        self._covered = covered
        self._shapes = {name: p.shape for name, p in covered.items()}
        modules = dict(network.named_modules())
        owners = [(k.rpartition("."), p) for k, p in covered.items()]
        self._owners = [(modules[m], name, p) for (m, _, name), p in owners]
        self.masks: dict[str, Tensor] = {
            name: torch.ones_like(p, dtype=torch.uint8) for name, p in covered.items()
        }
        self._records = Records(self.criteria.wants, covered)
        self._regrowth = Regrowth(self._held()) if regrow else None
        rankings = self._rankings()
        self._set(rankings, [None] * len(rankings))

    # --- public --------------------------------------------------------------------------------

    @explain_former()
    def sparsify_model(self, sparsity: Sparsity) -> nn.Module:
        """Zero this share of the groups now, the lowest scores first, and return the model.

        Args:
            sparsity: a fraction in [0, 1], or {layer or block: fraction}; layers not named stay as
                they are. What is zero already stays, also where the fraction is smaller.
        """
        self.sparsify_to(self.targets(sparsity))
        return self.model

    def regrow_model(self, sparsity: Sparsity) -> nn.Module:
        """Let weights come back until this share of the groups is zero, and return the model.

        They start at zero and learn again, where a gradient reaches them: not in a layer whose
        output a ReLU shuts off on all inputs. The group whose score was highest when it was zeroed
        comes back first, what was zero from the start last. What is not zero stays, also where the
        fraction is larger.

        Args:
            sparsity: a fraction in [0, 1], or {layer or block: fraction}; layers not named come
                back.

        Raises:
            RuntimeError: made without `regrow=True`.
        """
        self.regrow_to(self.targets(sparsity))
        return self.model

    def hold_zeros(self) -> None:
        """Hold all groups that are zero in the model, also whole layers, which else are fresh."""
        for group in self._groups:
            group.emptied = True
        self._set(self._rankings(), [None] * len(self._groups))

    def apply(self) -> None:
        """Write +0.0 where the masks are 0; call after each optimizer step."""
        if self._any:
            self._refuse_replaced()
            weights, masks = list(self._covered.values()), list(self.masks.values())
            if weights[0].device != masks[0].device:  # the model was moved
                masks = [m.to(w.device) for m, w in zip(masks, weights, strict=True)]
                self.masks = dict(zip(self.masks, masks, strict=True))
            try:
                apply_masks(weights, masks)
            except RuntimeError:
                self._refuse_pruned()
                raise

    def report(self) -> pd.DataFrame:
        """What was asked and what the model holds now, a row a layer; last 'total'.

        Columns: `layer`; `coupled`, further layers whose filters go with its own; `groups` that
        may be zeroed; `asked`, the fraction; `n`, the groups that is; `zeros` there are;
        `reached`, their share; `limit`, what made the difference, or why a layer was skipped;
        `weights`, `parameters` and `macs` (one sample), in all and zero. Zeros save no MACs
        until they are removed.
        """
        self._refuse_pruned()
        counted = macs(self._network, self._inputs) if self._inputs is not None else {}
        together = self.context == "global"
        return sparsity_report(
            self._groups, self.skipped, self.asked, together, self.limits, counted
        )

    def reached(self) -> float:
        """The share of the groups that the masks zero."""
        return self._zeros / sum(g.whole for g in self._groups)

    @property
    def record_bytes(self) -> int:
        """Memory that copies of initial or previous weights take, for criteria that need them."""
        return self._records.bytes

    # --- for callbacks -------------------------------------------------------------------------

    def targets(self, sparsity: Sparsity) -> tuple[float, ...]:
        """A sparsity as fractions: one for each of the layers, or one for all under 'global'."""
        together = self.context == "global"
        return targets_of(sparsity, self._groups, self.granularity, together, self._no_such)

    def frozen(self, names: Iterable[str]) -> list[str]:
        """The layers and blocks, of these names, that are chosen, but frozen."""
        live = {plain(k): False for k, why in self.skipped.items() if why == FROZEN}
        live |= {plain(layer): True for group in self._groups for layer in group.layers}
        return frozen_of(names, live)

    def held(self) -> tuple[float, ...]:
        """The share of the groups that is zero in the model, in the form of `targets`."""
        zeros = [r.held for r in self._rankings()]
        whole = [g.whole for g in self._groups]
        if self.context == "global":
            return (sum(zeros) / sum(whole),)
        return tuple(z / n for z, n in zip(zeros, whole, strict=True))

    def origins(self, targets: Sequence[float], begun: Sequence[float]) -> tuple[float, ...]:
        """Where ways to `targets` began that hold what is zero now, see `targets`.

        Without a share of the way behind, that is what is held. Else it is 0, where a way from 0
        would have come here; or what leads straight on from here to the target, also less than 0.

        Args:
            targets: where the ways lead.
            begun: the shares of the way that were taken, in their order.
        """
        entries = [self._groups] if self.context == "global" else [[g] for g in self._groups]
        ways = zip(entries, self.held(), targets, strict=True)
        return tuple(origin(*way, begun, self.limits) for way in ways)

    def sparsify_to(self, targets: Sequence[float], asked: Sequence[float] | None = None) -> None:
        """Zero these fractions, see `targets`; on the way to those `asked` in the end."""
        self._refuse_pruned()
        self._decide(lambda: self._zero(targets))
        self.asked = tuple(targets if asked is None else asked)
        self.apply()
        self._records.renew()

    def regrow_to(self, targets: Sequence[float], asked: Sequence[float] | None = None) -> None:
        """Let groups come back until these fractions are zero, see `sparsify_to`."""
        if self._regrowth is None:
            raise RuntimeError(
                "nothing was kept to regrow by: make it with Sparsifier(regrow=True)"
            )
        self._refuse_pruned()
        self._decide(lambda: self._regrow(targets))
        self.asked = tuple(targets if asked is None else asked)
        self.apply()
        self._records.renew()

    def scores(self) -> list[Tensor]:
        """One score a group, layer by layer.

        Raises:
            ValueError: what the criterion returns cannot be used; the layer is named.
            NothingToCompare: it sees no difference to what was recorded, or no gradients.
        """
        scores = self._scores(self._records)
        if self.criteria.needs:
            refuse_equal(scores)
        return scores

    def try_criteria(self) -> None:
        """Score once, with numbers in place of records, so that what fails does so early."""
        if self.criteria.needs:
            self._scores(lambda need, name: stand_in(need, self._covered[name]))
            return
        for group in self._groups:
            ranking_of(group, self.criteria, relative=self.context == "global").check()

    def release(self) -> None:
        """Let go of the masks and of what the criterion needed; reports go on working."""
        self.masks, self._any, self._regrowth = {}, False, None
        self._records.release()
        self.model, self._processes = self._network, Processes()

    # --- inside --------------------------------------------------------------------------------

    def _decide(self, choose: Callable[[], None]) -> None:
        """Choose what is zero; of several processes the first one does, and shares its masks."""

        def zeros() -> int:
            choose()
            return self._zeros

        self._zeros = self._processes.decided(zeros)
        self._processes.share(self.masks.values())
        self._any = self._zeros > 0

    def _zero(self, targets: Sequence[float]) -> None:
        counts, rankings = self._counts(targets), self._rankings()
        cuts: list[Cutoff | None] = [None] * len(rankings)
        if self._more(counts, [r.held for r in rankings]):
            scores = self.scores() if self._keeps_scores else []
            if scores:
                pairs = zip(scores, rankings, strict=True)
                rankings = [ScoreRanking(lambda s=s: s, r.marks) for s, r in pairs]
            sizes = [g.size for g in self._groups]
            widths = [g.width for g in self._groups]
            cuts = choose_cuts(rankings, counts, sizes=sizes, widths=widths, limits=self.limits)
            if self._regrowth is not None:
                gone = [zero_marks(r, cut) for r, cut in zip(rankings, cuts, strict=True)]
                self._regrowth.went(gone, scores)
        self._set(rankings, cuts)

    def _regrow(self, targets: Sequence[float]) -> None:
        widths = [g.width for g in self._groups]
        zero = self._regrowth.back(self._counts(targets), widths, self.limits.round_to)
        rankings = [ScoreRanking(list, z) for z in zero]  # of which only the marks count
        self._set(rankings, [None] * len(rankings))

    def _scores(self, records: Lookup) -> list[Tensor]:
        criterion, relative = self.criteria.reading(records), self.context == "global"
        return [g.scores(criterion, relative=relative) for g in self._groups]

    def _refuse_replaced(self) -> None:
        for module, name, p in self._owners:
            if module._parameters.get(name, p) is not p:
                raise RuntimeError(
                    f"{name!r} of a {type(module).__name__} is another parameter than when this "
                    f"Sparsifier looked at the model, as after load_state_dict(assign=True): make "
                    f"a new one"
                )

    def _refuse_pruned(self) -> None:
        if any(p.shape != self._shapes[name] for name, p in self._covered.items()):
            raise RuntimeError(
                "the model was pruned since this Sparsifier looked at it: make a new one; take a "
                "report before pruning, or ask the Pruner for its own"
            )

    def _counts(self, targets: Sequence[float]) -> int | list[int]:
        """How many groups these fractions are: over all layers under 'global', or in each."""
        whole = [g.whole for g in self._groups]
        if self.context == "global":
            return round(targets[0] * sum(whole))
        return [round(s * n) for s, n in zip(targets, whole, strict=True)]

    def _held(self) -> list[Tensor]:
        return [g.zeroed() for g in self._groups]

    @property
    def _keeps_scores(self) -> bool:
        return bool(self.criteria.needs) or self._regrowth is not None

    def _rankings(self) -> list[Ranking]:
        found = [
            ranking_of(g, self.criteria, relative=self.context == "global", kept=self._keeps_scores)
            for g in self._groups
        ]
        if self._regrowth is None:
            return found
        # what came back may be zero still, but is not held; its scores are made when they count
        pairs = zip(found, self._regrowth.zero, strict=True)
        return [ScoreRanking(list, r.marks & z.to(r.marks.device)) for r, z in pairs]

    def _more(self, counts: int | Sequence[int], held: Sequence[int]) -> bool:
        """Whether groups are to go beside those held: there are such that may."""
        most = [self.limits.most(g.size, g.free) for g in self._groups]
        left = any(m > h for m, h in zip(most, held, strict=True))
        if isinstance(counts, int):
            return left and counts > sum(held)
        return any(min(n, m) > h for n, m, h in zip(counts, most, held, strict=True))

    def _set(self, rankings: Sequence[Ranking], cuts: Sequence[Cutoff | None]) -> None:
        pairs = zip(self._groups, rankings, strict=True)
        whole = {g.parameter for g, r in pairs if isinstance(r, ElementRanking)}
        for name, mask in self.masks.items():
            if name not in whole:
                mask.fill_(1)
        self._zeros = 0
        for group, ranking, cut in zip(self._groups, rankings, cuts, strict=True):
            write_cut(group, ranking, cut, self.masks)
            self._zeros += ranking.held if cut is None else cut.n
        self._any = self._zeros > 0

    def _no_such(self, name: object) -> str:
        if not isinstance(name, str):
            return f"a sparsity for each layer goes by names of layers, got {name!r}"
        skipped = {plain(k): why for k, why in self.skipped.items()}
        if name in skipped:
            more = "; with mixed=True it can" if skipped[name] == NORMALISED else ""
            return f"layer {name!r} cannot be sparsified: {skipped[name]}{more}"
        module = {plain(k): m for k, m in self._network.named_modules()}.get(name)
        if module is not None and maskable(module, on_request=True):
            return (
                f"layer {name!r} is not among the layers to sparsify: name it in layers, as "
                f"embeddings must be but for the granularity 'filter'"
            )
        which = "" if module is None else "that can be sparsified"
        known = [plain(k) for g in self._groups for k in g.layers]
        return unknown_name(name, known, "sparsity", which)
