"""`slmops model-card`, `export`, `import` and `convert-adapter`. Imports what a command needs when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

InsecureOption = Annotated[
    bool,
    typer.Option("--insecure", help="Speak plain HTTP to a registry on another machine; this one needs no asking."),
]
NameOption = Annotated[
    str | None, typer.Option(help="Name of the model, as the card's title [default: the directory's].")
]
BaseModelOption = Annotated[
    str | None, typer.Option(metavar="OWNER/NAME", help="The base model's name on the Hub, which no artifact knows.")
]
LicenceOption = Annotated[
    str | None, typer.Option(metavar="SPDX", help="Licence, such as Apache-2.0 [default: what the base model states].")
]
LanguageOption = Annotated[
    list[str] | None, typer.Option("--language", metavar="CODE", help="Language of the rows, such as en; repeatable.")
]


def model_card(
    verdict: Annotated[Path, typer.Argument(metavar="DIR", help="What gate or publish wrote: a verdict or a release.")],
    name: NameOption = None,
    base_model: BaseModelOption = None,
    licence: LicenceOption = None,
    languages: LanguageOption = None,
) -> None:
    """Print a model card in the Hugging Face Hub's form: only what was measured, and how the model was made.

    Example: slmops model-card verdict --name "Building commands" --base-model HuggingFaceTB/SmolLM2-135M-Instruct
    --language en > README.md
    """
    typer.echo(_card(verdict, name, base_model, licence, languages), nl=False)


def export(
    variant: Annotated[Path, typer.Argument(metavar="DIR", help="One variant, such as variants/cpu-int4.")],
    target: Annotated[
        str, typer.Argument(metavar="HOST/REPOSITORY:TAG", help="Where it goes in a container registry.")
    ],
    verdict: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Verdict or release to make a model card from, which goes along.")
    ] = None,
    name: NameOption = None,
    base_model: BaseModelOption = None,
    licence: LicenceOption = None,
    languages: LanguageOption = None,
    insecure: InsecureOption = False,
) -> None:
    """Push a variant to a container registry as a ModelPack, which Kubernetes mounts and other tools pull.

    Log in with `docker login`, or set ORAS_USER and ORAS_PASS. Keep the digest that is printed: it names these bytes,
    whatever happens to the tag.

    Example: slmops export variants/cpu-int4 registry.example.com/models/assistant:1.4 --verdict verdict
    """
    from slmops.packaging.modelpack import Description, push

    card = _card(verdict, name, base_model, licence, languages) if verdict else None
    description = Description(name=name, licence=licence)
    typer.echo(push(variant, target, card=card, description=description, insecure=insecure))


def import_(
    source: Annotated[
        str, typer.Argument(metavar="HOST/REPOSITORY:TAG", help="A ModelPack, by tag or @sha256:DIGEST.")
    ],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="New directory for its files.")],
    insecure: InsecureOption = False,
) -> None:
    """Pull a ModelPack from a container registry: every file checked against its digest, all of them or none.

    Example: slmops import registry.example.com/models/assistant:1.4 assistant
    """
    from slmops.packaging.modelpack import pull

    typer.echo(pull(source, directory, insecure=insecure))


def convert_adapter(
    adapter: Annotated[Path, typer.Argument(metavar="DIR", help="A LoRA adapter, as PEFT saves it.")],
    output: Annotated[Path, typer.Argument(metavar="FILE", help="The .onnx_adapter file to write.")],
    variant: Annotated[
        Path, typer.Option(metavar="DIR", help="The variant that it is for, built with accept_adapters=true.")
    ],
) -> None:
    """Make a LoRA adapter one that ONNX Runtime switches at request time, over a variant of its base model.

    Example: slmops convert-adapter adapters/kitchen kitchen.onnx_adapter --variant variants/cpu-int4
    """
    from slmops.quantize.adapters import write_adapter

    write_adapter(adapter, variant, output)
    typer.echo(output)


def _card(
    path: Path, name: str | None, base_model: str | None, licence: str | None, languages: list[str] | None
) -> str:
    from slmops import artifacts
    from slmops.packaging import model_card as cards

    sidecar = artifacts.expect(path, "verdict", "release")
    title = name or path.resolve().name
    return cards.model_card(sidecar, name=title, base_model=base_model, licence=licence, languages=languages or [])
