"""The endpoints, a file for each thing they serve."""

from cake_server.routes import chat, completions, models

ROUTES = (
    chat.chat_completions,
    completions.completions,
    models.list_models,
    models.show_model,
    models.health,
    models.metrics,
    models.cancel,
    models.delete_request,
)
