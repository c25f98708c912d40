"""When a fact of the files is a note, and when it is a leak."""

MAX_REPEATED = (
    0.01  # share of test images with a twin in train: accuracy may be too high by as much;
)
# and share of all images that stand under both labels
TELLING_AUC = 0.65  # lower end of the interval from which on a probe is told: pictures differ a little in any two pools
LEAK_AUC = 0.95  # upper end from which on it is a leak: on 73 groups the interval of a perfect guess, Wilson's, starts there
RULES = f"""A fact of the files is a note where the 95% interval of its AUC starts at {TELLING_AUC} or above. It is a LEAK where that
interval also reaches {LEAK_AUC} (on 73 groups a perfect guess has the interval {LEAK_AUC} to 1), or the interval of a
detector's AUC on the same images: a figure of the detector then shows nothing that the files do not. With
--features_file that detector is a logistic regression. Twins in train and test are a LEAK above {MAX_REPEATED:.0%} of the
test images, where accuracy may be too high by as much; pictures under both labels, above {MAX_REPEATED:.0%} of all images.
Exit codes: 0 no leak, 1 a LEAK, 2 nothing could be done."""
