"""The branches `router.files` and `router.batches` of diptych.yaml. Imports nothing that starts anything."""

from __future__ import annotations

from pydantic import Field

from diptych.protos.settings import Bytes, Seconds, Settings


class FileSettings(Settings):
    """Uploaded files, and those that batches write."""

    max_bytes: Bytes = Field(512 << 20, description="largest uploaded file")
    tenant_bytes: Bytes = Field(16 << 30, description="all files of a tenant together; one more gets 403")
    tenant_files: int = Field(100_000, ge=1, description="files of a tenant; one more gets 403")
    keep_free_bytes: int = Field(256 << 20, ge=0, description="uploads leave so much of the disk free; else 507")
    max_uploads: int = Field(
        32, ge=1, description="uploads at once; one more gets 503 with retry-after; a tenant has at most three quarters"
    )
    upload_timeout_s: Seconds = Field(
        3600.0, description="time to send an upload; limits.body_timeout_s without a byte ends it earlier"
    )
    batch_expires_s: Seconds = Field(
        30 * 86_400.0, description="files of purpose batch, and results, are deleted after this unless told otherwise"
    )


class BatchSettings(Settings):
    """Batches, and how much of the cluster they take."""

    input_bytes: Bytes = Field(200 << 20, description="largest input file of a batch")
    line_bytes: Bytes = Field(1 << 20, description="longest line of it")
    max_lines: int = Field(50_000, ge=1, description="requests in a batch")
    max_errors: int = Field(100, ge=1, description="wrong lines that a failed batch tells")
    tenant_batches: int = Field(100, ge=1, description="unfinished batches of a tenant; one more gets 429")
    at_once: int = Field(
        16, ge=1, description="batches that a router works on, and up to three times as many of tenants with none there"
    )
    concurrency: int = Field(64, ge=1, description="requests of batches in work in a router, shared among tenants")
    batch_concurrency: int = Field(16, ge=1, description="of one batch")
    priority: int = Field(
        100,
        ge=0,
        lt=2**30,
        description="of their requests, added to what a line asks for; others have 0, lower is sooner",
    )
    max_attempts: int = Field(
        5, ge=1, description="of a line whose engines fail; what is only refused for lack of room waits"
    )
    lease_s: Seconds = Field(4.0, description="a batch whose router is silent for this long goes to another")
    poll_s: Seconds = Field(0.5, description="how often a router looks for batches, and for those to cancel")
    kept_s: Seconds = Field(90 * 86_400.0, description="an ended batch can be asked about for this long")
