#!/usr/bin/env bash
# The published README says `cd stanford_alpaca`; the launcher lives one folder up.
exec bash "$(dirname "${BASH_SOURCE[0]}")/../train_emo.sh" "$@"
