"""Examples for labels against all activations."""

from sae_runtime import Backbone
from sae_runtime.catalogue.contexts import half_of
from sae_runtime.catalogue.label_examples import ExampleMaker
from sae_runtime.catalogue.neighbors import nearest_latents
from sae_runtime.catalogue.pages import PageMaker
from sae_runtime.catalogue.settings import CatalogueSettings
from sae_runtime.dictionary.dictionary import Dictionary
from tests.sae_runtime.catalogue.conftest import N_LATENTS, Collect, ReferenceToken, activations


def test_active_silent_and_hard_ones(
    collected: Collect,
    tiny_backbone: Backbone,
    dictionary: Dictionary,
    settings: CatalogueSettings,
    reference: list[ReferenceToken],
    records: list[dict[str, str]],
) -> None:
    settings = settings.model_copy(update={"label_tokens": 5, "label_negatives": 7, "label_hard_negatives": 6})
    pieces = [tiny_backbone.token_bytes(i) for i in range(tiny_backbone.vocab_size)]
    nearest, _ = nearest_latents(dictionary.decoder, None, settings.neighbors)
    maker = PageMaker("tiny", collected(), pieces, settings)
    examples_of = ExampleMaker(maker, nearest)
    z = activations(reference)
    n_hard = 0
    for latent in range(N_LATENTS):
        both = examples_of.of(latent)
        for half, examples in enumerate((both.fit, both.held_out)):
            assert (half_of(0, examples.document) == half).all()
            assert (examples.active <= ~examples.hard).all()
            n_hard += int(examples.hard.sum())
            assert examples.hard.sum() <= 6
            assert (~examples.hard & ~examples.active).sum() <= 7
            if half == 0:
                fires = {
                    (reference[i].document, reference[i].position)
                    for i in maker.collection.contexts.for_labels(latent)[0]
                }
                assert fires <= set(zip(examples.document.tolist(), examples.position.tolist(), strict=True))
            for i in range(len(examples)):
                candidates = [
                    token
                    for token, t in enumerate(reference)
                    if (t.document, t.position) == (examples.document[i], examples.position[i])
                    and t.id == examples.ids[i, -1]
                    and abs(z[token, latent] - examples.activation[i]) <= 0.01 * z[:, latent].max() + 1e-6
                ]
                windows = []
                for token in candidates:  # a document of several rows has several tokens at one position
                    t = reference[token]
                    before = [reference[j].id for j in range(max(token - 4, token - t.position), token + 1)]
                    after = reference[token + 1] if token + 1 < len(reference) else None
                    next_id = after.id if after is not None and after.position == t.position + 1 else -1
                    windows.append(([-1] * (5 - len(before)) + before, next_id))
                assert (examples.ids[i].tolist(), examples.next_id[i]) in windows
                record = records[examples.document[i]]
                assert examples.kinds[examples.kind[i]] == record["kind"]
                language = examples.language[i]
                assert (examples.languages[language] if language >= 0 else "") == record.get("lang", "")
                if examples.hard[i]:
                    assert any((z[token, nearest[latent]] > 0).any() for token in candidates)
    assert n_hard > N_LATENTS
