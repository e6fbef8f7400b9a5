"""Golden values of the metrics and calibrations: scikit-learn's, the calibration error by its definition in numpy.

    pip install scikit-learn numpy
    python metrics.py > metrics.json
"""

import json

import numpy as np
import sklearn
from sklearn.calibration import _sigmoid_calibration
from sklearn.isotonic import IsotonicRegression
from sklearn.metrics import brier_score_loss, roc_auc_score

BINS = 15


def calibration_error(p, wrong):
    total = 0.0
    for m in range(BINS):
        low, high = m / BINS, (m + 1) / BINS
        inside = (p > low) & (p <= high) | ((m == 0) & (p == 0))
        if inside.any():
            total += inside.mean() * abs(p[inside].mean() - wrong[inside].mean())
    return total


def case(name, scores, wrong, at):
    probabilities = 1 / (1 + np.exp(-scores))
    a, b = _sigmoid_calibration(scores, wrong)
    isotonic = IsotonicRegression(out_of_bounds="clip", y_min=0, y_max=1).fit(scores, wrong)
    return {
        "name": name,
        "scores": scores.tolist(),
        "wrong": wrong.astype(bool).tolist(),
        "auroc": roc_auc_score(wrong, scores),
        "brier": brier_score_loss(wrong, probabilities),
        "ece": calibration_error(probabilities, wrong),
        # scikit-learn's is 1 / (1 + exp(a s + b))
        "platt": [-float(a), -float(b)],
        "at": at,
        "isotonic": isotonic.predict(np.array(at)).tolist(),
    }


rng = np.random.default_rng(0)
cases = []

scores = rng.normal(size=200)
wrong = (rng.random(200) < 1 / (1 + np.exp(-2 * scores + 0.5))).astype(float)
cases.append(case("smooth", scores, wrong, [-9.0, -1.0, -0.25, 0.0, 0.4, 1.5, 9.0]))

scores = np.round(rng.normal(size=150) * 2) / 2
wrong = (rng.random(150) < 1 / (1 + np.exp(-scores))).astype(float)
cases.append(case("many ties", scores, wrong, [-5.0, -0.5, -0.3, 0.0, 0.75, 1.0, 5.0]))

scores = rng.normal(size=60)
wrong = (rng.random(60) < 1 / (1 + np.exp(3 * scores))).astype(float)
cases.append(case("the wrong way round", scores, wrong, [-1.0, 0.0, 1.0]))

scores = np.array([-2.0, -1.0, -0.5, 0.5, 1.0, 2.0])
wrong = np.array([0.0, 0.0, 0.0, 1.0, 1.0, 1.0])
cases.append(case("separable", scores, wrong, [-1.0, 0.0, 0.25, 1.0]))

print(json.dumps({"scikit-learn": sklearn.__version__, "cases": cases}, indent=1))
