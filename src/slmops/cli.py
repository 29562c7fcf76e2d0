"""The `slmops` command. Imports what a command needs when it runs, so that help and errors are fast."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Literal

import typer

from slmops import __version__
from slmops.errors import ConfigError, SlmopsError
from slmops.progress import set_up_logging
from slmops.step import fail

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""

app = typer.Typer(
    name="slmops",
    help="Small language models from training data to edge nodes, on Kubeflow.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
edge_app = typer.Typer(help="What runs on an edge node: fetch a release, serve it.", no_args_is_help=True)
app.add_typer(edge_app, name="edge")

PipelineArgument = Annotated[
    str,
    typer.Argument(metavar="PIPELINE", help="Name of a pipeline (`slmops compile` lists them) or a compiled .yaml."),
]
RecipeOption = Annotated[
    str | None, typer.Option("--recipe", metavar="NAME", help="Recipe to compile with [default: default].")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="A run-time parameter (data_uri=rows.csv) or a field of the recipe (distill.num_epochs=3); repeatable.",
    ),
]


def main() -> None:
    """Entry point of the command: an error of ours is one line on standard error, and an exit code."""
    set_up_logging()
    try:
        app()
    except SlmopsError as error:
        fail(str(error), error.exit_code)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"slmops {__version__}")
        raise typer.Exit


@app.callback()
def _slmops(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command("compile")
def compile_command(
    pipeline: Annotated[
        str | None, typer.Argument(metavar="[PIPELINE]", help="Name of a pipeline; without one, list them all.")
    ] = None,
    recipe: RecipeOption = None,
    settings: SetOption = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="File to write [default: PIPELINE.yaml].")
    ] = None,
) -> None:
    """Compile a pipeline to KFP's YAML. Without a name: list pipelines and recipes.

    Example: slmops compile distill_to_edge --recipe demo --set distill.num_epochs=3 -o demo.yaml
    """
    from slmops.kubeflow import compile as compiling
    from slmops.kubeflow import registry

    if pipeline is None:
        for name in registry.names():
            typer.echo(f"{name}: recipes {', '.join(sorted(registry.find(name).recipes))}")
        return
    target = output or Path(f"{pipeline}.yaml")
    if registry.is_compiled(pipeline):
        raise ConfigError(f"{pipeline} is compiled already; give the name of a pipeline: {', '.join(registry.names())}")
    compiled, parameters = compiling.prepare(pipeline, recipe, settings or [], target)
    if parameters:
        target.unlink()
        raise ConfigError(
            f"{', '.join(parameters)}: run-time parameters are not compiled in; give them to `slmops run` or to "
            "`slmops submit`"
        )
    typer.echo(f"{compiled.path}: {compiled.name}, {len(compiled.tasks)} tasks")


@app.command()
def run(
    pipeline: PipelineArgument,
    recipe: RecipeOption = None,
    settings: SetOption = None,
    output_dir: Annotated[Path, typer.Option(help="Where everything goes that the run writes.")] = Path("slmops-runs"),
    no_cache: Annotated[
        bool,
        typer.Option("--no-cache", help="Run every step, also those done before with the same inputs and settings."),
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show all that KFP says, too.")] = False,
    runner: Annotated[
        Literal["process", "docker"],
        typer.Option(help="`process`: with the packages installed here; `docker`: each step in its own image."),
    ] = "process",
) -> None:
    """Run a pipeline on this machine, without a cluster.

    With `--runner docker` the steps run without network but to the object store, and not as root; build the images
    first, with `make images`.

    The same command goes on where a killed or failed run stopped. Data behind s3:// is not watched for changes: use
    --no-cache after one.

    Example: slmops run distill_to_edge --recipe demo --set data_uri=rows.csv --set base_model_uri=models/base
    --set store_uri=./store
    """
    from slmops.kubeflow import compile as compiling

    with tempfile.TemporaryDirectory(prefix="slmops-") as folder:
        compiled, parameters = compiling.prepare(pipeline, recipe, settings or [], Path(folder) / "pipeline.yaml")
        arguments = compiled.arguments(parameters)
        compiled.check_settings(arguments)

        from slmops.kubeflow import local

        try:
            local.run(
                compiled, arguments, output_dir=output_dir, use_cache=not no_cache, verbose=verbose, runner=runner
            )
        except KeyboardInterrupt:
            typer.echo("interrupted; the same command goes on from here", err=True)
            raise typer.Exit(INTERRUPTED) from None


@app.command()
def submit(
    pipeline: PipelineArgument,
    host: Annotated[str, typer.Option(metavar="URL", help="Address of Kubeflow Pipelines.")],
    namespace: Annotated[str, typer.Option(help="Kubernetes namespace (profile) to run in.")] = "kubeflow",
    experiment: Annotated[str, typer.Option(help="Experiment that groups runs; made if it does not exist.")] = "slmops",
    run_name: Annotated[str | None, typer.Option(help="Name of the run [default: pipeline and time].")] = None,
    token_file: Annotated[
        Path | None, typer.Option(help="File with a bearer token; or set SLMOPS_KFP_TOKEN.", dir_okay=False)
    ] = None,
    recipe: RecipeOption = None,
    settings: SetOption = None,
    wait: Annotated[bool, typer.Option("--wait", help="Follow the run to its end.")] = False,
) -> None:
    """Submit a pipeline to Kubeflow Pipelines.

    Example: slmops submit distill_to_edge --host https://kfp.example.com --set data_uri=s3://data/rows.parquet
    --set base_model_uri=s3://models/base --set store_uri=s3://edge/releases
    """
    from slmops.kubeflow import compile as compiling

    with tempfile.TemporaryDirectory(prefix="slmops-") as folder:
        compiled, parameters = compiling.prepare(pipeline, recipe, settings or [], Path(folder) / "pipeline.yaml")
        arguments = compiled.arguments(parameters)
        compiled.check_settings(arguments)

        from slmops.kubeflow.submit import Server, read_token

        server = Server(host, namespace, read_token(token_file))
        run_id = server.submit(compiled, arguments, experiment=experiment, run_name=run_name)
    typer.echo(f"run: {server.url(run_id)}")
    if wait:
        server.wait(run_id, typer.echo)
        typer.echo("succeeded")


@app.command()
def doctor(
    store: Annotated[
        str | None, typer.Option(metavar="URI", help="Object store to probe: s3://bucket/prefix or a folder.")
    ] = None,
    model: Annotated[Path | None, typer.Option(metavar="DIR", help="Model directory to check.")] = None,
) -> None:
    """Check this machine, and say what to do about what is missing.

    Example: slmops doctor --store s3://edge/releases --model models/base
    """
    from slmops import doctor as checks

    found = list(checks.examine(store, model))
    for check in found:
        typer.echo(f"{check.state:<4}  {check.what}")
    if any(check.state == "fail" for check in found):
        raise typer.Exit(2)


@app.command()
def new(
    step: Annotated[
        str, typer.Argument(metavar="STEP", help="Name of the step: a verb, such as prune or translate_rows.")
    ],
    category: Annotated[str, typer.Option(help="Folder below components/, such as training.")],
) -> None:
    """Start a new step in a checkout: Config, run, component and test.

    Example: slmops new prune --category training
    """
    from slmops.kubeflow.scaffold import scaffold

    for path in scaffold(step, category):
        typer.echo(path)


@edge_app.command()
def pull(
    store: Annotated[str, typer.Option(metavar="URI", help="Object store: s3://bucket/prefix or a folder.")],
    channel: Annotated[str, typer.Option(metavar="NAME", help="Channel (pool of nodes) to follow.")],
    root: Annotated[Path, typer.Option(metavar="DIR", help="Directory of the node that holds releases.")],
) -> None:
    """Fetch the channel's release, verify it, and switch to it.

    Example: slmops edge pull --store s3://edge/releases --channel default --root /var/lib/slmops
    """
    from slmops.edge.pull import pull as pull_release

    result = pull_release(store, channel, root)
    state = "switched to" if result.switched else "still at"
    typer.echo(
        f"{state} {result.release_digest} ({result.variant}, {result.bytes_fetched:,} bytes fetched): {result.path}"
    )


@edge_app.command()
def serve(
    root: Annotated[Path, typer.Option(metavar="DIR", help="Directory that `slmops edge pull` fills.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on.")] = 8080,
    api_key_file: Annotated[
        Path | None, typer.Option(help="File with the key that clients must send.", dir_okay=False)
    ] = None,
    max_concurrency: Annotated[int, typer.Option(min=1, help="Requests answered at once.")] = 2,
    max_queue: Annotated[int, typer.Option(min=0, help="Requests that may wait; more are refused with 503.")] = 16,
) -> None:
    """Serve the current release with the OpenAI API.

    Example: slmops edge serve --root /var/lib/slmops --port 8080 --api-key-file /run/secrets/key
    """
    from slmops.edge.serve import serve as serve_release

    serve_release(root, host, port, api_key_file, max_concurrency, max_queue)


if __name__ == "__main__":
    main()
