"""Budgets, leases and spend."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006_money"
down_revision = "0005_responses_bytes"


def _account() -> list[sa.Column[str]]:
    return [
        sa.Column("budget", sa.String(64), nullable=False),
        sa.Column("scope", sa.String(1024), nullable=False),
        sa.Column("period", sa.String(10), nullable=False),
    ]


def upgrade() -> None:
    """The tables of store/budgets.py and store/spend.py."""
    op.create_table(
        "budget_accounts",
        *_account(),
        sa.Column("spent_nanos", sa.BigInteger(), nullable=False),
        sa.Column("committed_nanos", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("budget", "scope", "period", name="pk_budget_accounts"),
    )
    op.create_table(
        "budget_leases",
        *_account(),
        sa.Column("holder", sa.String(64), nullable=False),
        sa.Column("nanos", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("budget", "scope", "period", "holder", name="pk_budget_leases"),
    )
    op.create_table(
        "ledger_holders",
        sa.Column("holder", sa.String(64), nullable=False),
        sa.Column("flushes", sa.BigInteger(), nullable=False),
        sa.Column("seen_at_ms", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("holder", name="pk_ledger_holders"),
    )
    sums = ("requests", "input_tokens", "output_tokens", "cache_read_tokens", "cache_write_tokens", "cost_nanos")
    op.create_table(
        "spend",
        sa.Column("hour", sa.BigInteger(), nullable=False),
        sa.Column("tenant", sa.String(128), nullable=False),
        sa.Column("key_id", sa.String(64), nullable=False),
        sa.Column("route", sa.String(256), nullable=False),
        sa.Column("target", sa.String(384), nullable=False),
        *(sa.Column(name, sa.BigInteger(), nullable=False) for name in (*sums, "unpriced", "estimated")),
        sa.PrimaryKeyConstraint("hour", "tenant", "key_id", "route", "target", name="pk_spend"),
    )
