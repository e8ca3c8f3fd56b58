"""What a stored response takes, for its tenant's quota, and that another router is asked to end it."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005_responses_bytes"
down_revision = "0004_idempotency"


def upgrade() -> None:
    """Columns of store/responses.py, those of rows that are there filled."""
    op.add_column("responses", sa.Column("num_bytes", sa.BigInteger(), nullable=False, server_default="0"))
    op.add_column("responses", sa.Column("is_to_end", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.create_index("ix_responses_tenant_bytes", "responses", ["tenant", "num_bytes"])
    op.execute(
        "UPDATE responses SET num_bytes = length(body) + length(input) + coalesce("
        "(SELECT sum(length(frame)) FROM response_events WHERE response_id = responses.id), 0)"
    )
