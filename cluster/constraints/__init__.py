"""What an answer must match: grammars for the engine, judged and composed in the router, and the check afterwards."""
