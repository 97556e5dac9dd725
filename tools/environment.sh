# Sourced by the other scripts: creates and activates an environment in .venv, unless one is active.

if [ -z "${VIRTUAL_ENV:-}" ]; then
  if [ ! -x .venv/bin/python ]; then
    echo "creating an environment in .venv" >&2
    "${PYTHON:-python3}" -m venv .venv || {
      echo "python3 cannot create environments; on Debian and Ubuntu: apt-get install python3-venv" >&2
      exit 1
    }
  fi
  source .venv/bin/activate
fi

# install_llmjax REQUIREMENT: install it in editable mode, unless setup.py is unchanged since the last time.
install_llmjax() {
  local mark="$VIRTUAL_ENV/.llmjax-$(echo "$1" | tr -c 'a-z\n' _)"
  if [ ! -e "$mark" ] || [ setup.py -nt "$mark" ]; then
    echo "installing llmjax ($1), about a minute" >&2
    python -m pip install --quiet --disable-pip-version-check --editable "$1"
    touch "$mark"
  fi
}
