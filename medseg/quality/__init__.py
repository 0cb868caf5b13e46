"""The quality estimate: what Dice to expect of each label of a predicted mask, and whether a person should look at it.

witness      what the networks' own passes say while they predict (agreement, entropy, margin)
image        what the prepared image is like (intensities, noise, sharpness, extent, layout)
shape        what a label is like (volume, extent, objects, surface, place)
clouds       how far such numbers lie from those of the training cases
fit, apply   from out-of-fold cases to a model, and from the model to an estimate
"""
