"""The command `jaxode`: a sub-command an experiment, which imports what it needs when it runs."""

import sys

EXTRAS = "jaxode's command needs {}: pip install 'jaxode[experiments]'"


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the exit code: 0, 1 (a package is missing), 2 (bad option), 130 (Ctrl-C)."""
    try:
        import click

        code = commands().main(arguments, prog_name="jaxode", standalone_mode=False)
    except ModuleNotFoundError as error:
        if error.name not in ("click", "matplotlib", "sklearn"):
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


def commands():
    """The click group; experiments are imported by the commands that run them."""
    import click

    @click.group(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
    def group():
        """Experiments of jaxode: differential equations inside JAX models."""

    @group.command()
    @click.option("--out", default="runs/digits", help="Folder of checkpoints and figures.")
    @click.option(
        "--epochs", type=click.IntRange(1), default=None, help="Passes over the training data."
    )
    @click.option("--seed", type=click.IntRange(0), default=0, help="Of weights, order and shifts.")
    @click.option("--quick", is_flag=True, help="Tiny networks, one epoch: does everything work?")
    @click.option(
        "--adjoint",
        type=click.Choice(["replay", "backsolve"]),
        default="replay",
        help="How the ODE-Net is differentiated: through its accepted steps, or the adjoint ODE.",
    )
    @click.option(
        "--rtol",
        type=click.FloatRange(1e-6, 1.0),
        default=1e-2,
        help="Tolerance of the ODE-Net's solver, relative and absolute.",
    )
    @click.option("--fresh", is_flag=True, help="Start over instead of going on from checkpoints.")
    def digits(out, epochs, seed, quick, adjoint, rtol, fresh):
        """Train MLP, ResNet, RK-Net and ODE-Net on 8 x 8 digits (table 1 of Chen et al. 2018).

        Prints a table and writes results.json, metrics and figures. Ctrl-C keeps what was done; the
        same command goes on from there.
        """
        import dataclasses

        import matplotlib  # noqa: F401  here, so that a missing package shows at once
        import sklearn  # noqa: F401

        from jaxode.experiments import digits as experiment

        settings = experiment.Settings(seed=seed, adjoint=adjoint, rtol=rtol)
        settings = settings.quick() if quick else settings
        if epochs is not None:
            settings = dataclasses.replace(settings, epochs=epochs)
        try:
            results = experiment.run(out, settings, fresh=fresh, progress=sys.stderr.isatty())
        except (ValueError, OSError) as error:
            raise click.ClickException(str(error)) from error
        click.echo(experiment.table(results))
        click.echo(f"results.json, metrics and figures are in {out}")

    return group


if __name__ == "__main__":
    sys.exit(main())
