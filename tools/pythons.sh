#!/usr/bin/env bash
# Prints one interpreter a line for each Python 3.10-3.13 that PATH or pyenv has.
for minor in 10 11 12 13; do
  { command -v "python3.$minor" || true; ls -d "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3."$minor".*/bin/python; } 2>/dev/null |
    while read -r python; do "$python" --version >/dev/null 2>&1 && echo "$python" && break; done || true
done
