"""Settings of benchmark."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from slmops.config import Config
from slmops.device_classes import DeviceClass, DeviceClasses, parse_device_classes

MAX_PROMPT_LENGTH, MAX_STREAMS = 1 << 20, 256
MAX_POOL_REQUESTS = 1000
"""A pod on a pool hands its figures back through its log."""


class BenchmarkConfig(Config):
    """Latency, speed, memory and size of one model, on this machine or under the limits of a device."""

    variant: str = Field(default="full_precision", pattern=r"^[a-z0-9_-]+$")
    """`full_precision` for a Hugging Face directory, else the name of a quantized variant such as `cpu-int4`."""
    num_requests: int = Field(default=30, ge=1, le=100_000)
    """Measured requests of each repeat, one after the other."""
    num_warmup: int = Field(default=3, ge=0, le=1000)
    """Requests before them that are not counted."""
    max_new_tokens: int = Field(default=256, ge=1, le=32768)
    """Longest answer in tokens."""
    num_threads: int = Field(default=2, ge=1, le=1024)
    """Threads of the runtime; for a device class they are its CPUs."""
    dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    """Compute type of a Hugging Face directory; a quantized variant has its own."""
    device_class: str = Field(default="", max_length=42)
    """The class of `device_classes` under whose CPUs and memory a variant is measured; empty: this machine as it is."""
    device_classes: DeviceClasses = Field(default={})
    """Device classes by name, with the fields of manifests/edge/device-classes.yaml."""
    prompt_lengths: list[int] = Field(default=[16, 64, 256, 1024], max_length=16)
    """Tokens of prompts after which a variant's first token is timed; those too long for the class are left out."""
    streams: list[int] = Field(default=[1, 4, 8], max_length=16)
    """Numbers of answers at once for which a variant's decoding speed is measured."""
    num_repeats: int = Field(default=3, ge=1, le=100)
    """Processes that measure a variant one after the other; a Hugging Face directory is measured once."""
    noise_threshold: float = Field(default=0.1, gt=0, le=10)
    """Largest spread of a quiet measurement: standard deviation over mean of a figure between repeats."""
    pool: str = Field(default="", pattern=r"^([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)?$")
    """Edge pool on a node of which a Job measures the variant (its label slmops/pool); empty: in the step's own pod."""
    store_uri: str = Field(default="", max_length=2048)
    """Where a pool's nodes read: s3://bucket/prefix; the variant goes there as `publish` puts it."""
    edge_image: str = Field(default="", max_length=500)
    """Image of the Job on a pool, with its digest."""
    store_secret: str = Field(default="slmops-release-reader", pattern=r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$")
    """Secret in the step's namespace whose keys let the Job's pod read the store, as variables of its environment."""
    pending_timeout_s: float = Field(default=600, gt=0, le=30 * 86400)
    """Seconds that the Job's pod may wait for a node and its image."""
    pool_timeout_s: int = Field(default=1800, ge=1, le=30 * 86400)
    """Seconds that the Job may take after that."""

    @field_validator("prompt_lengths", "streams")
    @classmethod
    def _are_counts(cls, counts: list[int], info: ValidationInfo) -> list[int]:
        most = MAX_STREAMS if info.field_name == "streams" else MAX_PROMPT_LENGTH
        if wrong := [count for count in counts if not 1 <= count <= most]:
            raise ValueError(f"each must be 1 to {most:,}, got {wrong[0]:,}")
        return counts

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.device_class and self.device_class not in self.device_classes:
            known = ", ".join(sorted(self.device_classes)) or "empty"
            raise ValueError(f"device_class {self.device_class!r} is not in device_classes, which is {known}")
        if self.pool:
            if missing := [name for name in ("device_class", "store_uri", "edge_image") if not getattr(self, name)]:
                raise ValueError(f"pool is {self.pool}, which needs {', '.join(missing)}")
            if not self.store_uri.startswith("s3://"):
                raise ValueError(f"store_uri is {self.store_uri}, and the nodes of a pool read s3://bucket/prefix")
            if self.num_requests * self.num_repeats > MAX_POOL_REQUESTS:
                raise ValueError(f"on a pool num_requests times num_repeats may be {MAX_POOL_REQUESTS} at most")
        return self

    def find_device_class(self) -> DeviceClass | None:
        """The class to measure for; None for this machine as it is."""
        if not self.device_class:
            return None
        return parse_device_classes(self.device_classes, "device_classes")[self.device_class]
