"""The `slmops` command. Imports what a command needs when it runs, so that help and errors are fast."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Annotated, Literal

import typer

from slmops import __version__
from slmops.errors import ConfigError, SlmopsError
from slmops.packaging import commands as packaging
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
app.command("model-card")(packaging.model_card)
app.command("export")(packaging.export)
app.command("import")(packaging.import_)
app.command("convert-adapter")(packaging.convert_adapter)

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
HostOption = Annotated[str, typer.Option(metavar="URL", help="Address of Kubeflow Pipelines.")]
NamespaceOption = Annotated[str, typer.Option(help="Kubernetes namespace (profile) to run in.")]
TokenFileOption = Annotated[
    Path | None, typer.Option(help="File with a bearer token; or set SLMOPS_KFP_TOKEN.", dir_okay=False)
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

    The same command goes on where a killed or failed run stopped, and repeats what a changed input concerns.

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
    host: HostOption,
    namespace: NamespaceOption = "kubeflow",
    experiment: Annotated[str, typer.Option(help="Experiment that groups runs; made if it does not exist.")] = "slmops",
    run_name: Annotated[str | None, typer.Option(help="Name of the run [default: pipeline and time].")] = None,
    service_account: Annotated[
        str | None, typer.Option(metavar="NAME", help="Service account of the steps' pods [default: the server's own].")
    ] = None,
    token_file: TokenFileOption = None,
    recipe: RecipeOption = None,
    settings: SetOption = None,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Run every step, also those done before with the same inputs.")
    ] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Follow the run to its end.")] = False,
) -> None:
    """Submit a pipeline to Kubeflow Pipelines: upload it as a version, unless it is there already, and start a run.

    Example: slmops submit distill_to_edge --host https://kfp.example.com --set data_uri=s3://data/rows.parquet
    --set base_model_uri=s3://models/base --set store_uri=s3://edge/releases
    """
    from slmops.kubeflow import compile as compiling

    with tempfile.TemporaryDirectory(prefix="slmops-") as folder:
        compiled, parameters = compiling.prepare(pipeline, recipe, settings or [], Path(folder) / "pipeline.yaml")
        arguments = compiled.arguments(parameters)
        compiled.check_settings(arguments)

        if no_cache:
            compiled = compiling.without_cache(compiled, Path(folder) / "without-cache.yaml")

        from slmops.kubeflow.follow import Follower
        from slmops.kubeflow.submit import Server, read_token

        server = Server(host, namespace, read_token(token_file))
        version = server.upload(compiled)
        run_name = run_name or f"{compiled.name} {time.strftime('%Y-%m-%d %H:%M:%S')}"
        run_id = server.start(
            version, arguments, experiment=experiment, run_name=run_name, service_account=service_account
        )
    typer.echo(f"version: {version.name}\nrun: {server.url(run_id)}")
    if not wait:
        return
    follower = Follower({key: task.display_name for key, task in compiled.tasks.items()}, typer.echo)
    try:
        server.wait(run_id, follower)
    except KeyboardInterrupt:
        typer.echo(
            f"no longer following; the run goes on. To end it: slmops cancel {run_id} --host {host} "
            f"--namespace {namespace}",
            err=True,
        )
        raise typer.Exit(INTERRUPTED) from None
    follower.tell("succeeded")


@app.command()
def cancel(
    run_id: Annotated[str, typer.Argument(metavar="RUN", help="Id of the run: the end of its address.")],
    host: HostOption,
    namespace: NamespaceOption = "kubeflow",
    token_file: TokenFileOption = None,
) -> None:
    """End a run on Kubeflow Pipelines.

    Example: slmops cancel 3f6c1d5e-1f7c-4f5b-9d0e-5f5b8f1f6a2b --host https://kfp.example.com
    """
    from slmops.kubeflow.submit import Server, read_token

    server = Server(host, namespace, read_token(token_file))
    server.cancel(run_id)
    typer.echo(f"asked to end: {server.url(run_id)}")


@app.command()
def promote(
    source: Annotated[str, typer.Option("--from", metavar="URI", help="Store that pipelines publish to.")],
    destination: Annotated[str, typer.Option("--to", metavar="URI", help="Store that edge nodes read.")],
    channels: Annotated[
        list[str], typer.Option("--channel", metavar="NAME", help="Channel (pool of nodes) to promote; repeatable.")
    ],
    from_profile: Annotated[
        str | None,
        typer.Option(
            envvar="SLMOPS_FROM_PROFILE", help="Profile of AWS_SHARED_CREDENTIALS_FILE for --from [default: AWS_...]."
        ),
    ] = None,
    to_profile: Annotated[str | None, typer.Option(envvar="SLMOPS_TO_PROFILE", help="The same for --to.")] = None,
) -> None:
    """Copy the releases of channels from one store to another, verified, and point the channels there to them.

    Example: slmops promote --from s3://staging/models --to s3://releases/models --channel berlin --channel paris
    """
    from slmops.release.promote import promote as promote_release
    from slmops.storage import open_store

    stores = open_store(source, from_profile), open_store(destination, to_profile)
    for channel in channels:
        result = promote_release(*stores, channel)
        if result:
            state = "now points to" if result.changed else "already points to"
            typer.echo(
                f"{channel}: {state} {result.channel.release_digest}, sequence {result.channel.sequence} "
                f"({result.bytes_copied:,} bytes copied)"
            )


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
    max_concurrency: Annotated[int, typer.Option(min=1, help="Requests answered at once, in one batch.")] = 8,
    max_queue: Annotated[int, typer.Option(min=0, help="Requests that may wait; more are refused with 503.")] = 16,
) -> None:
    """Serve the current release with the OpenAI API.

    Example: slmops edge serve --root /var/lib/slmops --port 8080 --api-key-file /run/secrets/key
    """
    from slmops.edge.serve import serve as serve_release

    serve_release(root, host, port, api_key_file, max_concurrency, max_queue)


if __name__ == "__main__":
    main()
