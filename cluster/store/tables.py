"""The one MetaData that the modules of the nouns (keys.py, ...) define their tables on.

Called by them and by the test that compares the migrations with it. Knows no engine and no table.
"""

from __future__ import annotations

from sqlalchemy import MetaData

# Names that do not depend on the database, so that a later migration can name what an earlier one made.
METADATA = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)
