# SPDX-License-Identifier: Apache-2.0
"""The one exception a user is meant to see: a single line that says what is wrong and what to do."""


class CalibrationError(ValueError):
    """Input or option that can't be calibrated; the message is complete and needs no traceback."""
