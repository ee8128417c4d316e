"""Tables, coloured tokens and figures for every notebook: `show.table(rows)`, `show.picture(figure)`."""

from .figures import (  # noqa: F401
    alt_text,
    bars,
    dropped_rows,
    lengths,
    lora_shapes,
    method,
    nf4_levels,
    picture,
    pipeline,
    ultrafeedback,
)
from .highlight import heat_map, heat_map_figure, tokens  # noqa: F401
from .result_figures import (  # noqa: F401
    by_length_gap,
    by_position,
    calibration,
    distance_by_beta,
    loss_curve,
    margins,
    other_losses,
    rates,
    reward_curves,
    training_curves,
)
from .tables import (  # noqa: F401
    against_table,
    answers,
    average,
    change,
    change_table,
    config_table,
    conversation,
    held_out_table,
    instructions_table,
    kinds_table,
    requests_table,
    samples,
    share,
    span,
    table,
)
