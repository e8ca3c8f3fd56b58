"""String formats as regular expressions that say exactly what the check after an answer says.

`rewrite` puts them into grammars. llguidance has formats of its own; those here replace the ones that differ from the
standard: 29 February in every year, second 60 at any time, names of hosts without a bound on their length.
"""

from __future__ import annotations

from typing import Final

_YEAR_29 = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)"
_DATE = (
    "(?:[0-9]{4}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    f"|02-(?:0[1-9]|1[0-9]|2[0-8]))|{_YEAR_29}-02-29)"
)
_OFFSET = "(?:[zZ]|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_TIME = f"(?:(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\\.[0-9]{{1,9}})?{_OFFSET}|23:59:60(?:\\.[0-9]{{1,9}})?[zZ])"
# At most 63 characters, no two hyphens in third and fourth place: those mark encoded names of other alphabets.
_A, _B = "[a-zA-Z0-9]", "[a-zA-Z0-9-]"
_LABEL = f"{_A}(?:{_A}|{_B}(?:{_A}(?:{_B}{{0,59}}{_A})?|-{_A}(?:{_B}{{0,58}}{_A})?))?"
_HOST = f"{_LABEL}(?:\\.{_LABEL})*"
_POINTER = "(?:/(?:[^~/]|~[01])*)*"
_PATH_CHARACTER = "(?:[a-zA-Z0-9._~!$&'()*+,;=:@-]|%[0-9a-fA-F]{2})"
_SEGMENT = "(?:[a-zA-Z0-9._~!$&'()*+,;=@-]|%[0-9a-fA-F]{2})+"  # the first of a relative path: no colon
_TAIL = f"(?:\\?(?:{_PATH_CHARACTER}|[/?])*)?(?:#(?:{_PATH_CHARACTER}|[/?])*)?"
_AUTHORITY = "(?:[a-zA-Z0-9._~!$&'()*+,;=:-]*@)?(?:[a-zA-Z0-9._~!$&'()*+,;=-]|%[0-9a-fA-F]{2})*(?::[0-9]*)?"
_ABSOLUTE = f"/(?:{_PATH_CHARACTER}+(?:/{_PATH_CHARACTER}*)*)?"
_START = f"//{_AUTHORITY}(?:/{_PATH_CHARACTER}*)*|{_ABSOLUTE}"
_URI = f"[a-zA-Z][a-zA-Z0-9+.-]*:(?:{_START}|{_PATH_CHARACTER}+(?:/{_PATH_CHARACTER}*)*)?{_TAIL}"
_REFERENCE = f"(?:{_START}|{_SEGMENT}(?:/{_PATH_CHARACTER}*)*)?{_TAIL}"
_ATOM = "[a-zA-Z0-9!#$%&'*+/=?^_`{|}~-]+"
_BYTE = "(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"

# Schemas that say the same. Several patterns stand in an allOf: a text must match each.
SCHEMAS: Final[dict[str, dict[str, object]]] = {
    "date": {"pattern": f"^{_DATE}$"},
    "time": {"pattern": f"^{_TIME}$"},
    "date-time": {"pattern": f"^{_DATE}[tT]{_TIME}$"},
    "hostname": {"pattern": f"^{_HOST}$", "maxLength": 253},
    "email": {"pattern": f"^{_ATOM}(?:\\.{_ATOM})*@{_HOST}$", "maxLength": 254, "allOf": [{"pattern": "^[^@]{1,64}@"}]},
    "ipv4": {"pattern": f"^{_BYTE}(?:\\.{_BYTE}){{3}}$"},
    "uri": {"pattern": f"^{_URI}$"},
    "uri-reference": {"pattern": f"^(?:{_URI}|{_REFERENCE})$"},
    "json-pointer": {"pattern": f"^{_POINTER}$"},
    "relative-json-pointer": {"pattern": f"^(?:0|[1-9][0-9]{{0,8}})(?:#|{_POINTER})$"},
}

# llguidance's own are exact.
BUILT_IN: Final = frozenset(["duration", "ipv6", "uuid"])

# Checked after an answer alone.
UNFOLLOWED: Final = frozenset(["idn-email", "idn-hostname", "iri", "iri-reference", "uri-template", "regex"])
