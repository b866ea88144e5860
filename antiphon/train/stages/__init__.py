"""The kinds of training, one file each; `antiphon.train.run` finds them by the name in a recipe."""
