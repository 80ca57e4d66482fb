# SPDX-License-Identifier: Apache-2.0
"""The one exception a user of comet-eval is meant to see: a single line that says what is wrong and what to do."""


class EvaluationError(ValueError):
    """Input or option that can't be evaluated; the message is complete and needs no traceback."""
