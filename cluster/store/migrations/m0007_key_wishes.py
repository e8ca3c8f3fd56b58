"""What a key's requests may want otherwise than their route has it, and the tags of its requests."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007_key_wishes"
down_revision = "0006_money"


def upgrade() -> None:
    """Columns of store/keys.py; keys that are there may override nothing, as before."""
    op.add_column("keys", sa.Column("may_override", sa.String(64), nullable=False, server_default=""))
    op.add_column("keys", sa.Column("tags", sa.String(1024), nullable=False, server_default=""))
