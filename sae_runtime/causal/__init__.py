"""What features do to the model: scores under edits, ablations, attributions, contrasts.

`score` runs texts with and without edits. `ablation` removes features one at a time, and `ablation_summary` averages
the effects. `attribution` finds the features behind a logit. `contrast` finds the features that tell two sets of texts
apart, and `suggestion` turns them into edits. `predictions` compares the model's predictions, and `prefix` shares the
blocks before a changed site.
"""
