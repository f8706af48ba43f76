"""What is known of the features of a dictionary: its catalogue, and the labels that were written since."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from sae_runtime.catalogue.label_store import LabelStore
from sae_runtime.catalogue.read import Catalogue
from sae_runtime.catalogue.records import (
    FeatureFilter,
    FeaturePage,
    FeatureSummary,
    Label,
    SearchHit,
    Sort,
    best_first,
)

if TYPE_CHECKING:
    from sae_runtime.dictionary.dictionary import Dictionary


class Annotations:
    """Of one dictionary. Every method may be called from several threads.

    All methods raise CatalogueError if a file is damaged. Labels of a person or a model stand beside those of the
    catalogue: the best of all is shown in summaries.
    """

    def __init__(
        self, dictionary: Dictionary, catalogue: Catalogue | None, written: LabelStore | None, problem: str = ""
    ) -> None:
        """`catalogue` and `written` are None where there is none that can be used.

        `problem` says why a catalogue that is there cannot be used.
        """
        self._dictionary = dictionary
        self.catalogue = catalogue
        self.written = written
        self.problem = problem

    def close(self) -> None:
        if self.catalogue is not None:
            self.catalogue.close()
        if self.written is not None:
            self.written.close()

    def page(self, feature: int) -> FeaturePage | None:
        """All that is known of a feature; None without a catalogue, or if the catalogue lacks the feature."""
        page = None if self.catalogue is None else self.catalogue.page(feature)
        written = self._written([feature]).get(feature)
        if page is None or written is None:
            return page
        return replace(page, summary=_shown(page.summary, written), labels=best_first((*written, *page.labels)))

    def summaries(
        self, chosen: FeatureFilter, *, sort: Sort, descending: bool, offset: int, limit: int
    ) -> tuple[FeatureSummary, ...]:
        """As of the catalogue, which there must be: order and conditions are by its labels."""
        assert self.catalogue is not None
        return self._with_written(
            self.catalogue.summaries(chosen, sort=sort, descending=descending, offset=offset, limit=limit)
        )

    def summaries_of(self, features: Sequence[int]) -> tuple[FeatureSummary, ...]:
        """Of these features, in their order. Those that no catalogue has get figures of the statistics, or zeros."""
        listed = () if self.catalogue is None else self.catalogue.summaries_of(features)
        known = {summary.feature: summary for summary in listed}
        return self._with_written([known.get(feature) or self._bare(feature) for feature in features])

    def labels_of(self, features: Iterable[int]) -> dict[int, str]:
        """The best label of each of these features that has one."""
        wanted = list(features)
        return {summary.feature: summary.label for summary in self.summaries_of(wanted) if summary.label}

    def labels(self) -> list[tuple[int, Label]]:
        """Every label of every feature, in the order of their numbers, and the best of a feature first."""
        n_latents = self._dictionary.n_latents
        written = self._written(range(n_latents))
        labels = []
        for feature in range(n_latents):
            page = None if self.catalogue is None else self.catalogue.page(feature)
            of_rules = () if page is None else page.labels
            labels += [(feature, label) for label in best_first((*written.get(feature, ()), *of_rules))]
        return labels

    def search(self, text: str, limit: int) -> tuple[SearchHit, ...]:
        """The features that `Catalogue.search` finds, and those whose written labels have all the words; best first.

        The latter come first: somebody has looked. (Their own BM25 scores are near 0, as there are few such labels.)
        """
        hits = () if self.catalogue is None else self.catalogue.search(text, limit)
        scores = {hit.summary.feature: hit.score for hit in hits}
        above = max(scores.values(), default=0.0)
        for feature, score in [] if self.written is None else self.written.search(text, limit):
            scores[feature] = scores.get(feature, 0.0) + above + score
        best = sorted(scores, key=lambda feature: (-scores[feature], feature))[:limit]
        return tuple(SearchHit(summary, scores[summary.feature]) for summary in self.summaries_of(best))

    def _written(self, features: Iterable[int]) -> dict[int, tuple[Label, ...]]:
        return {} if self.written is None else self.written.labels_of(features)

    def _with_written(self, summaries: Sequence[FeatureSummary]) -> tuple[FeatureSummary, ...]:
        written = self._written(summary.feature for summary in summaries)
        return tuple(
            _shown(summary, written[summary.feature]) if summary.feature in written else summary
            for summary in summaries
        )

    def _bare(self, feature: int) -> FeatureSummary:
        statistics = self._dictionary.statistics
        rate, largest = (0.0, 0.0) if statistics is None else (statistics.firing_rate[feature], statistics.max[feature])
        return FeatureSummary(feature, "", "", None, float(rate), float(largest), (), ())


def _shown(summary: FeatureSummary, written: Sequence[Label]) -> FeatureSummary:
    """The summary with the best of its label and the written ones."""
    present = [Label(summary.label, summary.label_source, summary.label_f1)] if summary.label else []
    best = best_first([*written, *present])[0]
    return replace(summary, label=best.text, label_source=best.source, label_f1=best.f1)
