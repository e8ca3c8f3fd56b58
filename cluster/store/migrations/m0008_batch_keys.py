"""Whose key made a batch: rules, budgets and limits hold for its requests as for that key's own."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008_batch_keys"
down_revision = "0007_key_wishes"


def upgrade() -> None:
    """Columns of store/batches.py; of batches that are there nobody knows the key."""
    op.add_column("batches", sa.Column("key_id", sa.String(128), nullable=False, server_default=""))
    op.add_column("batches", sa.Column("key_tags", sa.String(1024), nullable=False, server_default=""))
