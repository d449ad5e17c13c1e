"""Numbers of the risk objective worked out independently of this code, rounded to six digits."""

RANGE_0_5 = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
ATOMS = [0.0, 0, 0, 0, 0, 0, 1, 2, 2, 5]
FIVE = [0.0, 1, 1, 2, 3]

# scores, q_alpha, q_beta (interpolated at 0.2, 0.8), RVaR_{0:.2}, RVaR_{.2:.8}, MVaR(omega 0.5)
MEASURES = {
    "range": (RANGE_0_5, 1.0, 4.0, 0.166667, 2.5, 1.55),
    "atoms": (ATOMS, 0.0, 2.0, 0.0, 0.5, 0.3),
    "five": (FIVE, 0.8, 2.2, 0.0, 1.333333, 0.8),
}
# scores, q_alpha, q_beta, then the official monitor's rvar, cvar, mvar at w_mix 1.5
MONITOR = {
    "range": (RANGE_0_5, 1.0, 4.0, 2.5, 0.5, 1.3),
    "atoms": (ATOMS, 0.0, 2.0, 0.555556, 0.0, 0.222222),
}
# Advantages of the scores 0..5 at quantiles (1, 4), alpha 0.2, beta 0.8
ADVANTAGES = [
    (dict(form="paper", omega=0.5), [-4.5, -3, -2, -1, 0, 0]),
    (dict(form="paper", omega=0.0), [-4, -3, -2, -1, 0, 0]),
    (dict(form="official"), [-5, -2, -1.333333, -0.666667, 0, 0]),
    (dict(form="official", eps=1e-6), [-4.999982, -1.999997, -1.333331, -0.666666, 0, 0]),
    (dict(form="official", natural=False), [-3, 0, 0.666667, 1.333333, 2, 2]),
    (dict(form="official", w_mix=0.0), [-5, -5, -3.333333, -1.666667, 0, 0]),
    (dict(form="official", w_mix=0.0, natural=False), [0, 0, 1.666667, 3.333333, 5, 5]),
    (dict(form="seeking"), [-2, -2, -1.333333, -0.666667, 0, 3]),
    (dict(form="seeking", natural=False), [0, 0, 0.666667, 1.333333, 2, 5]),
]
STD_0_5 = 1.870829  # of 0..5, n - 1
OVER_STD = {
    True: [-2.672601, -1.069043, -0.712695, -0.356348, 0, 0],
    False: [-1.603559, 0, 0.356348, 0.712695, 1.069043, 1.069043],
}
# (alpha, beta, w_mix) -> (effective omega, scale)
EQUIVALENT_OMEGA = {(0.2, 0.8, 1.5): (3.5, 0.666667), (0.2, 0.9, 1.5): (4.25, 0.571429)}
W_MIX_OF_OMEGA_HALF = {(0.2, 0.8): 0.5, (0.2, 0.9): 0.428571}

# One bundle with the scores FIVE and its own quantiles (0.8, 2.2)
FIVE_STD = 1.140175
FIVE_ADVANTAGES = [
    (dict(form="official", eps=1e-6), False, [-3.33332, -0.799999, -0.799999, -0.133333, 0]),
    (dict(form="official", eps=1e-6), True, [-2.923512, -0.701645, -0.701645, -0.116941, 0]),
    (
        dict(form="official", eps=1e-6, natural=False),
        False,
        [-2.399988, 0.133333, 0.133333, 0.799999, 0.933332],
    ),
    (
        dict(form="official", eps=1e-6, natural=False),
        True,
        [-2.104927, 0.116941, 0.116941, 0.701645, 0.818585],
    ),
    (dict(form="paper"), False, [-2.6, -1.2, -1.2, -0.2, 0]),
]
FIVE_NO_EPS_OVER_STD = [-2.923527, -0.701646, -0.701646, -0.116941, 0]  # same for rewards -1 / +1

TRACKER_LEVELS = tuple(round(0.05 * i, 2) for i in range(1, 20))
TRACKER_FIRST = [0.0, 1, 1, 2, 2, 3, 3, 4, 5, 5]
TRACKER_SECOND = [0.0, 0, 1, 1, 2, 2, 2, 3, 4, 5]
TRACKER_START = [
    *(0.45, 0.9, 1, 1, 1.25, 1.7, 2, 2, 2.05, 2.5),
    *(2.95, 3, 3, 3.3, 3.75, 4.2, 4.65, 5, 5),
]
TRACKER_AFTER = [
    *(0.435, 0.89, 0.995, 1, 1.235, 1.69, 1.995, 2, 2.025, 2.48),
    *(2.935, 2.99, 2.995, 3.29, 3.745, 4.19, 4.645, 5, 5.005),
]
TRACKER_20_80 = [(1.0, 4.2), (1.0, 4.19), (1.0, 4.18)]
BINOMIAL_COUNTS = [1, 5, 10, 10, 5, 1]  # of 32, scores 0..5
BINOMIAL_STEPS_TO_ATOM = (748, 59)  # updates until within 0.1 of 2 (level 0.2) and 3 (level 0.8)
BINOMIAL_RANGE = (1.9657, 2.0035, 2.996, 3.033)  # extremes of both over the last 2000 updates

# (questions, bundle_size) -> (bundles counting a short one, size of the last)
BUNDLES = {(512, 5): (103, 2), (1024, 5): (205, 4), (7, 3): (3, 1), (10, 5): (2, 5)}
PAPER_REWARDS = [[1.0, 0, 1], [0, 0, 1], [1, 1, 0], [0, 1, 1], [1, 0, 0]]
PAPER_SCORES = [[1.0, 0, 2], [1, 2, 1], [1, 0, 0]]
PAPER_PERMUTATION = [[0, 1, 2], [2, 0, 1], [1, 2, 0], [0, 2, 1], [0, 1, 2]]
PAPER_SCORES_PERMUTED = [[2.0, 0, 1], [1, 1, 2], [1, 0, 0]]

# Two questions, three draws, index pairing: official form, eps 1e-6, bundle quantiles and std
CREDIT_REWARDS = [[1.0, 0, 1], [0, 0, 1]]
CREDIT_SCORES, CREDIT_QUANTILES = [1.0, 0, 2], (0.4, 1.6)
# (credit, natural) -> advantages per question
CREDIT = {
    ("uniform", True): [[-0.399999, -1.999991, 0], [-0.399999, -1.999991, 0]],
    ("uniform", False): [[0.399999, -1.199993, 0.799998], [0.399999, -1.199993, 0.799998]],
    ("score", True): [[-0.199999, -2.999986, 0], [-0.599998, -2.999986, 0]],
    ("std", True): [[-0.692817, -3.464079, 0], [-0.692817, -3.464079, 0]],
    ("sum-mean", True): [[-0.199999, -1.333327, 0], [-0.199999, -0.666664, 0]],
    ("sum-mean", False): [[0.199999, -0.799995, 0.266666], [0.199999, -0.399998, 0.533332]],
}
# sum-mean with the advantage 0.7 * (R - its mean)
CENTRED_CREDIT = [[0, -0.466667, 0.233333], [0, -0.233333, 0.466667]]
# Five questions whose right answers get a negative advantage under sum-mean (natural off)
INVERTED_REWARDS = [
    *([1.0, 1, 1, 0, 0], [1, 1, 0, 1, 0], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0], [1, 0, 1, 1, 0]),
]
INVERTED_QUANTILES = (1.6, 4.2)
INVERTED_BUNDLE = [0.901115, 0.831799, 0.485216, 0.138633, -2.495387]
INVERTED_CREDIT = [
    [0.163839, 0.277266, 0.970432, 0.103975, -0.534726],
    [0.163839, 0.277266, -1.455648, -0.069317, -0.534726],
    [0.163839, 0.277266, 0.970432, 0.103975, -0.534726],
    [0.245759, 0.415899, -0.970432, 0.069317, -0.356484],
    [0.163839, -0.415899, 0.970432, -0.069317, -0.534726],
]

PASS_AT_K = {
    (10, 3, 1): 0.3,
    (10, 3, 5): 0.916667,
    (10, 0, 5): 0.0,
    (16, 1, 8): 0.5,
    (32, 2, 16): 0.758065,
    (10, 8, 3): 1.0,
    (4, 2, 2): 0.833333,
}

# Categorical policy over the scores 0..5, alpha 0.25, beta 0.8, omega 0.5
CATEGORICAL_P = [0.1, 0.2, 0.25, 0.2, 0.15, 0.1]
CATEGORICAL_QUANTILES, CATEGORICAL_MVAR = (1.0, 4.0), 1.575
CATEGORICAL_ADVANTAGE = [-4.5, -3, -2, -1, 0, 0]
CATEGORICAL_GRADIENT = [-0.275, -0.25, -0.0625, 0.15, 0.2625, 0.175]
# Independent Bernoulli questions in one bundle, alpha 0.2, beta 0.8, omega 0.5:
# (success rates, pmf of R, q_alpha, q_beta, MVaR, dMVaR / dlogit)
BERNOULLI = [
    ((0.3, 0.6), (0.28, 0.54, 0.18), 0.0, 1.0, 0.52, (0.084, 0.168)),
    (
        (0.2, 0.4, 0.5, 0.7, 0.9),
        (0.0072, 0.0954, 0.3154, 0.3794, 0.1774, 0.0252),
        2.0,
        4.0,
        2.0199,
        (0.14992, 0.24444, 0.26125, 0.23247, 0.10449),
    ),
]

# An all-wrong bundle beside tracked quantiles (1, 4)
ALL_WRONG = {"paper": -4.5, "official": -4.999982}
# One right answer among n: bundle quantiles, std, (wrong, right) over std for natural on and off
RARE_SUCCESS = {
    5: ((0.0, 0.2), 0.447214, (-0.298141, 0.0), (0.0, 0.298141)),
    10: ((0.0, 0.0), 0.316228, (0.0, 0.0), (0.0, 0.0)),
}
# One question per bundle: P(wrong) -> quantiles, A(0), A(1)
SINGLE = {
    0.1: (1.0, 1.0, -1.5, 0.0),
    0.5: (0.0, 1.0, -1.0, 0.0),
    0.9: (0.0, 0.0, 0.0, 0.0),
}
