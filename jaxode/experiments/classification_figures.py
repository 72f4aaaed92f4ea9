"""The figures of the image experiments."""

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from jaxode.experiments.experiment import running_mean

COLOURS = {"mlp": "#999999", "resnet": "#E69F00", "rk-net": "#56B4E9", "ode-net": "#0072B2"}
LABELS = {"mlp": "MLP", "resnet": "ResNet", "rk-net": "RK-Net", "ode-net": "ODE-Net"}


def training(curves):
    """Test error, and evaluations of the ODE-Net if there is one, against the step."""
    panels = 1 + ("ode-net" in curves)
    figure, axes = plt.subplots(1, panels, figsize=(5.5 * panels, 4.2), squeeze=False)
    left, right = axes[0, 0], axes[0, -1]
    for name, history in curves.items():
        tested = [r for r in history if "test error" in r]
        steps = [r["step"] for r in tested]
        errors = [100 * max(r["test error"], 1e-3) for r in tested]
        left.plot(steps, errors, color=COLOURS[name], label=LABELS[name])
    left.set(yscale="log", xlabel="training step", ylabel="test error (%)", title="Learning")
    left.set_yticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"])
    left.minorticks_off()
    left.legend()
    if "ode-net" in curves:
        cost = running_mean([r["evaluations"] for r in curves["ode-net"]])
        right.plot([r["step"] for r in curves["ode-net"]], cost, color=COLOURS["ode-net"])
        right.set(
            xlabel="training step", ylabel="evaluations of the field", ylim=(0, None),
            title="ODE-Net: cost of a forward solve",
        )  # fmt: skip
    return figure


def tolerance(sweep):
    """Error, time and test error against evaluations, for one trained network."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2))
    error_and_time(axes, sweep)
    return figure


def error_and_time(axes, sweep):
    """Panels (a) and (b) of figure 3 of the paper, and what the trade does to the test error."""
    count = np.array([row["evaluations"] for row in sweep])
    axes[0].plot(count, [row["feature error"] for row in sweep], "o-")
    axes[0].set(ylabel="error of the features (RMS)", yscale="log", title="(a) error")
    for row in sweep:
        axes[0].annotate(
            f"  {row['tolerance']:.0e}", (row["evaluations"], row["feature error"]), fontsize=10
        )
    (time,) = axes[1].plot(count, [1e3 * row["seconds"] for row in sweep], "o-", label="time")
    axes[1].set(ylabel="ms", title="(b) time, and the trade after training", ylim=(0, None))
    right = axes[1].twinx()
    errors = [100 * row["test error"] for row in sweep]
    (wrong,) = right.plot(count, errors, "s--", color="C1", label="test error")
    right.set(ylabel="%", ylim=(0, 2 * max(errors) + 0.1))
    right.spines["right"].set_visible(True)
    axes[1].legend(handles=[time, wrong])
    for axis in axes:
        axis.set_xlabel("forward evaluations")


def figure_3(sweep, history):
    """Figure 3 of the paper: error, time and backward evaluations; and cost over training."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 8))
    error_and_time(axes[0], sweep)
    for adjoint in sweep[0]["backward"]:
        counts = [row["backward"][adjoint] for row in sweep]
        forward, backward = (
            [c[k] for c in counts] for k in ("forward_evaluations", "backward_vjps")
        )
        axes[1, 0].plot(forward, backward, "o-", label=f'"{adjoint}"')
    top = max(row["evaluations"] for row in sweep)
    axes[1, 0].plot([0, top], [0, top], ":", color="#999999", label="as many as forward")
    axes[1, 0].set(ylabel="backward evaluations (vjps)", title="(c) backward and forward")
    axes[1, 0].legend()
    axes[1, 0].set_xlabel("forward evaluations")
    cost = running_mean([r["evaluations"] for r in history])
    axes[1, 1].plot([r["step"] for r in history], cost)
    axes[1, 1].set(
        xlabel="training step", ylabel="forward evaluations", ylim=(0, None),
        title="(d) cost over training",
    )  # fmt: skip
    return figure


def memory(rows):
    """Temporary memory of the gradient against accuracy."""
    figure, axis = plt.subplots(figsize=(6.5, 4.5))
    adjoints = [name for name in rows[0] if name not in ("tolerance", "steps")]
    for adjoint in adjoints:
        axis.plot(
            [row["tolerance"] for row in rows], [row[adjoint] / 2**20 for row in rows], "o-",
            label=f'"{adjoint}"',
        )  # fmt: skip
    for row in rows:
        top = max(row[adjoint] for adjoint in adjoints) / 2**20
        axis.annotate(
            f"{row['steps']} steps", (row["tolerance"], top), xytext=(0, 6), fontsize=10,
            textcoords="offset points", ha="center",
        )  # fmt: skip
    axis.set(
        xscale="log", yscale="log", xlabel="tolerance", ylabel="memory of the gradient (MiB)",
        title="Memory of the ODE block against accuracy",
    )  # fmt: skip
    axis.margins(0.12)  # for the words above the first and the last point
    axis.invert_xaxis()
    axis.legend()
    return figure


def between(net, test_set, times: int = 6, samples: int = 4):
    """What the ODE does to a few digits: the mean feature map, and all paths in two dimensions."""
    ts = np.linspace(0, 1, 25)
    # Of 64 channels, the 25 feature maps of 10,000 images would take 3 GB.
    x, y = jnp.asarray(test_set.x[:1000]), np.asarray(test_set.y[:1000])
    path = np.asarray(net.body.solve(net.features(x), ts).ys)
    figure = plt.figure(figsize=(13, 5.4))
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
