"""What features do to the model: scores under edits, ablations, attributions, contrasts.

`score` runs texts with and without edits; `ablation` takes features away one by one; `attribution` finds the features
behind a logit; `contrast` finds the features that tell two sets of texts apart, and `suggestion` makes an edit of them.
All of them compare predictions (`predictions`), and share the blocks before the changed site (`prefix`).
"""
