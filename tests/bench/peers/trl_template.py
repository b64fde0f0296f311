"""The workload's chat template with the marks by which TRL finds what is to be learnt."""

TEMPLATE = (
    "{% for item in messages %}{% if item['role'] == 'user' %}<|user|>\n{{ item['content'] }}"
    "{% elif item['role'] == 'assistant' %}<|assistant|>{% generation %}{{ '\\n' + item['content'] }}<|user|>"
    "{% endgeneration %}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
