"""From requests to tokens: engine sessions, placement, admission, merging by token index. No torch, no ray."""
