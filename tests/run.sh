#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Makes the environment and runs every test that this machine can run. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. examples/environment.sh
make_environment calibrate,eval,dev
python -m pytest -q "$@"
