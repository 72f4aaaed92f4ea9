"""The figures of `jaxode digits`."""

from pathlib import Path

import jax.numpy as jnp
import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {"mlp": "#999999", "resnet": "#E69F00", "rk-net": "#56B4E9", "ode-net": "#0072B2"}
LABELS = {"mlp": "MLP", "resnet": "ResNet", "rk-net": "RK-Net", "ode-net": "ODE-Net"}
STYLE = {
    "font.size": 13,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.dpi": 120,
    "lines.linewidth": 2.2,
    "axes.titlesize": 14,
    "savefig.bbox": "tight",
}


def draw(out: Path, curves, sweep, net, test_set) -> list[str]:
    """All figures, as PNG files in `out`; their names."""
    figures = {
        "training.png": lambda: training(curves),
        "tolerance.png": lambda: tolerance(sweep),
        "between.png": lambda: between(net, test_set),
    }
    with plt.rc_context(STYLE):
        for name, figure in figures.items():
            figure().savefig(out / name)
            plt.close("all")
    return list(figures)


def training(curves):
    """Test error, and evaluations of the ODE-Net, against the step."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for name, history in curves.items():
        tested = [r for r in history if "test error" in r]
        steps = [r["step"] for r in tested]
        errors = [100 * max(r["test error"], 1e-3) for r in tested]
        left.plot(steps, errors, color=COLOURS[name], label=LABELS[name])
    left.set(yscale="log", xlabel="training step", ylabel="test error (%)", title="Learning")
    left.set_yticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"])
    left.minorticks_off()
    left.legend(frameon=False)
    history = curves["ode-net"]
    right.plot(
        [r["step"] for r in history], [r["evaluations"] for r in history], color=COLOURS["ode-net"]
    )
    right.set(
        xlabel="training step", ylabel="evaluations of the field", ylim=(0, None),
        title="ODE-Net: cost of a forward solve",
    )  # fmt: skip
    return figure


def tolerance(sweep):
    """Figure 3 of the paper: error and time against evaluations, for one trained network."""
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    count = np.array([row["evaluations"] for row in sweep])
    panels = [
        ([row["feature error"] for row in sweep], "error of the features (RMS)", "log"),
        ([1e3 * row["seconds"] for row in sweep], "time of a forward solve (ms)", "linear"),
        ([100 * row["test error"] for row in sweep], "test error (%)", "linear"),
    ]
    for axis, (values, label, scale) in zip(axes, panels):
        axis.plot(count, values, "o-", color=COLOURS["ode-net"])
        axis.set(xlabel="evaluations of the field", ylabel=label, yscale=scale)
        if scale == "linear":
            axis.set_ylim(0, 1.25 * max([*values, 1e-9]))
    for row in sweep:
        axes[0].annotate(
            f"  {row['tolerance']:.0e}", (row["evaluations"], row["feature error"]), fontsize=10
        )
    axes[0].set_title("Trained at one tolerance, tested at many")
    return figure


def between(net, test_set, times: int = 6, samples: int = 4):
    """What the ODE does to a few digits: the mean feature map, and all paths in two dimensions."""
    ts = np.linspace(0, 1, 25)
    x, y = jnp.asarray(test_set.x), np.asarray(test_set.y)
    path = np.asarray(net.body.solve(net.features(x), ts).ys)
    figure = plt.figure(figsize=(13, 5.4), layout="constrained")
    left, right = np.ravel(np.asarray(figure.subfigures(1, 2, width_ratios=[1.25, 1])))
    axes = left.subplots(samples, times + 1)
    shown = [int(np.flatnonzero(y == digit)[0]) for digit in range(samples)]
    places = np.linspace(0, len(ts) - 1, times).astype(int)
    for row, sample in zip(axes, shown):
        row[0].imshow(test_set.x[sample, ..., 0], cmap="gray_r")
        for axis, place in zip(row[1:], places):
            axis.imshow(path[place, sample].std(-1), cmap="viridis")
        for axis in row:
            axis.set_xticks([])
            axis.set_yticks([])
    axes[0, 0].set_title("digit")
    for axis, place in zip(axes[0, 1:], places):
        axis.set_title(f"t = {ts[place]:.1f}")
    left.suptitle("Spread of the features at each pixel")
    pooled = path.mean((2, 3))
    centre = pooled.reshape(-1, pooled.shape[-1]).mean(0)
    _, _, axes_2d = np.linalg.svd(pooled[-1] - pooled[-1].mean(0), full_matrices=False)
    plane = (pooled - centre) @ axes_2d[:2].T
    axis = right.subplots()
    colours = plt.get_cmap("tab10")
    for digit in range(10):
        chosen = np.flatnonzero(y == digit)[:12]
        axis.plot(plane[:, chosen, 0], plane[:, chosen, 1], color=colours(digit), lw=0.8, alpha=0.6)
        axis.plot(plane[-1, chosen, 0], plane[-1, chosen, 1], "o", color=colours(digit), ms=5)
        middle = plane[-1, y == digit].mean(0)
        axis.annotate(str(digit), middle, fontsize=16, weight="bold", ha="center", va="center")
    axis.set(xlabel="first component", ylabel="second component", title="Paths of pooled features")
    return figure
