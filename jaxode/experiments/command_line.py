"""The command `jaxode`: a sub-command an experiment, whose options are its settings."""

import importlib
import sys

from jaxode import __version__

EXPERIMENTS = {  # module: what --help says of it; a module is imported when its command runs
    "digits": "MLP, ResNet, RK-Net and ODE-Net on scikit-learn's digits (table 1): the main job.",
    "mnist": "The same on MNIST or Fashion-MNIST, with figure 3.",
    "flow": "Continuous normalizing flows against planar ones (figures 4 and 5), FFJORD.",
    "latent": "Latent ODEs for irregular series against RNNs (table 2, figures 6 and 8).",
    "poisson": "Point processes whose intensity follows an ODE (figure 7).",
    "augment": "What plain neural ODEs cannot represent, and augmented ones do.",
    "regularize": "Cheaper dynamics: kinetic energy, Jacobian norm, random end time, solver estimates.",
    "physics": "Hamiltonian and divergence-free fields, symplectic methods, forcing, real dynamics.",
    "hyper": "Hypersolvers: a learnt correction makes a cheap method more accurate.",
    "resnet-limit": "A ResNet is Euler's method: the same weights at more and more steps.",
    "cde": "Neural controlled differential equations on series with missing values, against RNNs.",
    "match": "Flow matching along three paths against maximum likelihood, on clouds and digits.",
}
SMOKE_TEST = (
    "This was --quick, a smoke test: everything runs, but hardly anything is trained. Leave it out for "
    "numbers that mean something."
)
EXTRAS = "jaxode's command needs {}: pip install 'jaxode[experiments]'"


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the exit code.

    0, 1 (a package is missing), 2 (a bad option, or a run that cannot go on), 130 (Ctrl-C).
    """
    try:
        import click

        code = commands().main(arguments, prog_name="jaxode", standalone_mode=False)
    except ModuleNotFoundError as error:
        if error.name not in ("click", "matplotlib", "sklearn", "pooch", "statsmodels"):
            raise
        return fail(EXTRAS.format(error.name), 1)
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message())
        return 0
    except click.ClickException as error:
        return fail(f"jaxode: {error.format_message()}", 2)
    except (click.Abort, KeyboardInterrupt):
        return fail("jaxode: interrupted; the same command goes on from the last checkpoint.", 130)
    return code if isinstance(code, int) else 0


def fail(message: str, code: int) -> int:
    print(" ".join(message.split()), file=sys.stderr)
    return code


def module_of(name: str):
    return importlib.import_module(f"jaxode.experiments.{name.replace('-', '_')}")


def commands():
    """The click group; an experiment is imported when its command is asked for."""
    import click

    class Experiments(click.Group):
        def list_commands(self, ctx):
            return list(EXPERIMENTS)

        def get_command(self, ctx, cmd_name):
            return command(cmd_name) if cmd_name in EXPERIMENTS else None

        def format_commands(self, ctx, formatter):
            with formatter.section("Experiments"):
                formatter.write_dl(list(EXPERIMENTS.items()))

        def resolve_command(self, ctx, args):
            if args and args[0] not in EXPERIMENTS:
                ctx.fail(f"No experiment {args[0]!r}; there are {', '.join(EXPERIMENTS)}.")
            return super().resolve_command(ctx, args)

    group = Experiments(
        help="Experiments of jaxode: differential equations inside JAX models. Each trains, prints "
        "a table, and writes results.json, metrics and figures into a folder; interrupted, it goes "
        "on when it is called again. `jaxode EXPERIMENT --help` explains its options.",
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    return click.version_option(__version__, message="%(prog)s %(version)s")(group)


def command(name: str):
    """The command of one experiment."""
    import dataclasses

    import click
    import matplotlib
    import sklearn  # noqa: F401  here, so that a missing package shows at once

    matplotlib.use("Agg")  # figures go to files
    module = module_of(name)
    from jaxode.experiments.experiment import carry_out

    def callback(out, quick, full, fresh, **given):
        if quick and full:
            raise click.UsageError("--quick and --full exclude each other: give one of them.")
        scale = "quick" if quick else "full" if full else "default"
        given = {key: value for key, value in given.items() if value is not None}
        try:
            settings = module.Settings.at(scale, **given)
            bar = sys.stderr.isatty()
            results = carry_out(module, settings, out, fresh=fresh, progress=bar)
        except (ValueError, OSError, FloatingPointError) as error:
            raise click.ClickException(str(error)) from error
        click.echo(str(results))
        click.echo(f"results.json, metrics and figures are in {out}")
        if quick:
            click.echo(SMOKE_TEST)

    fields = [click_option(field) for field in dataclasses.fields(module.Settings)]
    general = [
        click.Option(
            ["--out"], default=f"runs/{name}", show_default=True,
            help="Folder of checkpoints and figures.",
        ),
        click.Option(
            ["--quick"], is_flag=True,
            help="A smoke test of about a minute: does everything run? Hardly anything is trained.",
        ),
        click.Option(["--full"], is_flag=True, help="The published size."),
        click.Option(
            ["--fresh"], is_flag=True, help="Start over instead of going on from checkpoints."
        ),
    ]  # fmt: skip
    return click.Command(name, callback=callback, params=[*general, *fields], help=module.__doc__)


def click_option(field):
    """An option from a field of settings; None if it is not given."""
    import click

    low, high, choices = (field.metadata[k] for k in ("low", "high", "choices"))
    kinds = {int: click.IntRange(low, high), float: click.FloatRange(low, high), str: str}
    scales = [
        f"{k}: {field.metadata[k]}" for k in ("quick", "full") if field.metadata[k] is not None
    ]
    shown = "; ".join([str(field.default) or "none", *scales])
    flag = field.type is bool
    return click.Option(
        [f"--{field.name.replace('_', '-')}"],
        type=None if flag else click.Choice(choices) if choices else kinds[field.type],
        default=None,
        is_flag=flag,
        help=field.metadata["help"] + ("" if flag else f"  [{shown}]"),
    )


if __name__ == "__main__":
    sys.exit(main())
