"""KFP interface of benchmark."""

import slmops_images as images
from kfp import dsl
from kfp.dsl import Artifact, Dataset, Input, Metrics, Output
from slmops_components.documented import documented

from slmops.benchmark.config import BenchmarkConfig


@dsl.component(base_image=images.OPTIMIZE, install_kfp_package=False)
@documented(BenchmarkConfig)
def benchmark(
    model: Input[Artifact],
    prompts: Input[Dataset],
    benchmark: Output[Artifact],
    metrics: Output[Metrics],
    variant: str = "full_precision",
    num_requests: int = 30,
    num_warmup: int = 3,
    max_new_tokens: int = 256,
    num_threads: int = 2,
    dtype: str = "float32",
    device_class: str = "",
    device_classes: dict = {},  # noqa: B006
    prompt_lengths: list[int] = [16, 64, 256, 1024],  # noqa: B006
    streams: list[int] = [1, 4, 8],  # noqa: B006
    num_repeats: int = 3,
    noise_threshold: float = 0.1,
    pool: str = "",
    store_uri: str = "",
    edge_image: str = "",
    store_secret: str = "slmops-release-reader",  # noqa: S107 - the name of a secret
    pending_timeout_s: float = 600,
    pool_timeout_s: int = 1800,
) -> None:
    """Measure a model's latency, speed, memory and size, on this machine or under the limits of a device.

    Args:
        model: A Hugging Face directory, or the output of quantize.
        prompts: Chat records whose prompts are sent.
        benchmark: The figures, with the machine they were measured on; or why there are none.
        metrics: The same figures for the dashboard.
    """
    from pathlib import Path

    from slmops.benchmark import config
    from slmops.kubeflow import measure_on_pool
    from slmops.step import step

    with step("benchmark"):
        sidecar = measure_on_pool.benchmark(
            config.BenchmarkConfig.pick(locals()),
            model=Path(model.path),
            prompts=Path(prompts.path),
            benchmark=Path(benchmark.path),
        )
        benchmark.metadata.update(sidecar.metadata())
        metrics.metadata.update(sidecar.write_metrics(Path(metrics.path)))
