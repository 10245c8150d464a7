"""Options that `pipeline("text-generation")` adds to a call by itself.

Where neither its user nor the checkpoint says otherwise, a pipeline samples (`do_sample=True`) at a temperature of 0.7
for 256 new tokens. Here these are nobody's words: settings come from the user, else they are Meta's defaults.
What this module does not do: it imports nothing of transformers; without a pipeline it finds nothing.
"""

import sys

_ADDED = {"do_sample", "max_new_tokens", "temperature"}
_BASE = "transformers.pipelines.base"


def added_by_a_pipeline() -> set[str]:
    """The options that the calling pipeline added by itself; none if no pipeline is calling.

    A pipeline mixes them into its user's keywords without a mark, so this looks up the stack for its `forward`, whose
    arguments are still the user's alone.
    """
    if _BASE not in sys.modules:
        return set()
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code.co_name == "forward" and frame.f_globals.get("__name__") == _BASE:
            pipeline, asked = frame.f_locals["self"], frame.f_locals["forward_params"]
            if asked.get("generation_config") is None:
                asked = {**pipeline._generate_kwargs, **asked}
            config = asked.get("generation_config")
            said = set(asked) | set({} if config is None else config.to_diff_dict())
            return (_ADDED & set(pipeline._generation_defaults)) - said
    return set()
