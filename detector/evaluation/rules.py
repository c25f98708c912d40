"""When a fact of the files is a note, and when it is a leak."""

# Of each class; there is no probe with fewer. No smaller class trains a classifier either.
MIN_IMAGES = 20
HUGE = 50_000_000  # pixels: the service refuses larger images
# The share of a split with a duplicate in train. Accuracy on it may be too high by this share.
# Also the share of all images that have copies under both labels.
MAX_REPEATED = 0.01
# A probe is reported where its interval starts here or above. Any two sets of images differ a bit.
TELLING_AUC = 0.65
# A probe is a leak where its interval reaches this value.
# Wilson's interval of a perfect probe on 73 groups starts here.
LEAK_AUC = 0.95
RULES = f"""A fact of the files is a note where the 95% interval of its AUC starts at {TELLING_AUC}
or above. A note becomes a LEAK where that interval also reaches {LEAK_AUC}, or the interval of a
detector's AUC on the same images. (On 73 groups a perfect probe has the interval {LEAK_AUC} to 1.)
The detector's AUC then proves no more than the files do. With --features_file that detector is a
logistic regression. An AUC takes {MIN_IMAGES} images of each class. With fewer, no file fact is a
LEAK. Duplicates in train and in test, val or external are a LEAK above
{MAX_REPEATED:.0%} of that split, because accuracy on it may be too high by that share. Images with
copies under both labels are a LEAK above {MAX_REPEATED:.0%} of all images. Exit codes: 0 no leak,
1 a LEAK, 2 nothing could be done."""
