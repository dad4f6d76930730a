"""The endpoints, a file for each thing they serve."""

from cake_server.routes import chat, cluster, completions, embeddings, images, models, pages, tokens

ROUTES = (
    chat.chat_completions,
    cluster.cluster,
    cluster.cluster_events,
    completions.completions,
    embeddings.embeddings,
    images.edit_images,
    images.generate_images,
    images.seed_image,
    models.cancel,
    models.delete_request,
    models.health,
    models.list_models,
    models.metrics,
    models.show_model,
    pages.docs,
    pages.index,
    pages.static,
    tokens.apply_template,
    tokens.detokenize,
    tokens.input_tokens,
    tokens.tokenize,
    tokens.tokenizer_info,
)
