"""Which drafters transformers' options of assisted decoding ask for: what to compile where another one drafts.

Who drafts is part of the step, so a request may only say what is so anyway. The options of the first table ask for
assisted decoding wherever they are set, the others in the call only: configs set some whoever drafts.
"""

WHO_DRAFTS = {
    "assistant_model": "DraftModel(assistant_model)",
    "prompt_lookup_num_tokens": "PromptLookup(prompt_lookup_num_tokens)",
    "assistant_early_exit": "EarlyExit(assistant_early_exit)",
    "use_mtp": "MTP.from_pretrained(folder)",
}
HOW_IT_DRAFTS = {
    "num_assistant_tokens": "DraftModel(assistant_model, num_assistant_tokens)",
    "max_matching_ngram_size": "PromptLookup(max_ngram=max_matching_ngram_size)",
}
