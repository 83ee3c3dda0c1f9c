"""Chat templates in the styles that fine-tunes have, written for these tests.

`FOLDED` have no system role. What is not in the plain style of Gemma's own is what such files do: trims and cuts,
loops with a namespace, macros, dates, tools, JSON, and thoughts that are taken out of earlier answers.
"""

GEMMA_WITH_SYSTEM = """{{ bos_token }}
{%- for message in messages %}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
    {{- '<start_of_turn>' + role + '\\n' ~ message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<start_of_turn>model\\n' }}
{%- endif %}
"""

ALPACA = """{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}### Instruction:
{{ m.content }}

### Response:
{% elif m.role == 'assistant' %}{{ m.content }}{{ eos_token }}

{% endif %}{% endfor %}"""

VICUNA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ messages[0].content.strip() }}{% set rest = messages[1:] %}"
    "{% else %}A chat between a curious user and an assistant.{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{{ ' USER: ' if m.role == 'user' else ' ASSISTANT: ' }}{{ m.content.strip() }}"
    "{{ eos_token if m.role == 'assistant' }}{% endfor %}{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)

CHATML = """{% for message in messages %}
{% if loop.first and message.role != 'system' %}
{{ '<start_of_turn>system\\nYou are a helpful assistant.<end_of_turn>\\n' }}
{% endif %}
{{ '<start_of_turn>' ~ message.role ~ '\\n' ~ message.content ~ '<end_of_turn>' ~ '\\n' }}
{% endfor %}
{% if add_generation_prompt %}{{ '<start_of_turn>assistant\\n' }}{% endif %}"""

LLAMA_2 = """{{ bos_token }}{% set ns = namespace(system='') %}
{%- if messages[0]['role'] == 'system' %}
    {%- set ns.system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}{% set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles must alternate') }}
    {%- endif %}
    {%- if loop.index0 == 0 %}{% set content = ns.system + message['content'] %}
    {%- else %}{% set content = message['content'] %}{% endif %}
    {%- if message['role'] == 'user' %}{{- '[INST] ' + content.strip() + ' [/INST]' }}
    {%- else %}{{- ' ' + content.strip() + ' ' + eos_token + bos_token }}{% endif %}
{%- endfor %}"""

LLAMA_3 = """{% set loop_messages = messages %}{% for message in loop_messages %}
{%- set content = '<start_of_turn>' + message['role'] + '<unused0>\\n\\n' + message['content'] | trim + '<end_of_turn>' %}
{%- if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>assistant<unused0>\\n\\n' }}{% endif %}"""

DATED = """{{- bos_token }}
{%- if strftime_now is defined %}{% set date = strftime_now('%d %b %Y') %}{% else %}{% set date = '26 Jul 2024' %}{% endif %}
{%- if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set turns = messages[1:] %}
{%- else %}{% set system = '' %}{% set turns = messages %}{% endif %}
{{- '<start_of_turn>system\\nToday: ' + date + '\\n' + system + '<end_of_turn>' }}
{%- for m in turns %}{{ '<start_of_turn>' + m.role + '\\n' + m.content + '<end_of_turn>' }}{% endfor %}
{{- '<start_of_turn>model\\n' }}"""

ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<unused1>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<unused2>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<unused3>\\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<unused3>' }}
{% endif %}
{% endfor %}"""

MISTRAL = """{{- bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content %}
{%- set turns = messages[1:] %}{% else %}{% set turns = messages %}{% endif %}
{%- for m in turns %}
    {%- if m.role == 'user' %}
        {%- if loop.last and system is defined %}{{- '[INST] ' + system + '\\n\\n' + m.content + '[/INST]' }}
        {%- else %}{{- '[INST] ' + m.content + '[/INST]' }}{% endif %}
    {%- elif m.role == 'assistant' %}{{- ' ' + m.content | trim + eos_token }}
    {%- else %}{{- raise_exception('Only user, system and assistant roles are supported!') }}{% endif %}
{%- endfor %}"""

DEEPSEEK = """{{ bos_token }}{% set ns = namespace(system='', first=true) %}
{%- for m in messages if m.role == 'system' %}{% set ns.system = ns.system + m.content %}{% endfor %}{{ ns.system }}
{%- for m in messages %}
{%- if m.role == 'user' %}{{ '<start_of_turn>' + m.content }}{% elif m.role == 'assistant' %}
{%- set content = m.content %}{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}
{{- '<unused5>' + content + '<end_of_turn>' }}{% endif %}{% endfor %}{{ '<unused5><think>\\n' }}"""

QWEN_3 = """{%- set ns = namespace(last=messages|length - 1, searching=true) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.searching and message.role == 'user' and not (message.content.startswith('<tool_response>')
        and message.content.endswith('</tool_response>')) %}
        {%- set ns.searching = false %}{% set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}{% set content = message.content %}{% else %}{% set content = '' %}{% endif %}
    {%- if message.role == 'assistant' %}
        {%- set reasoning = '' %}
        {%- if '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last and reasoning %}
            {{- '<start_of_turn>assistant\\n<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + content }}
        {%- else %}{{- '<start_of_turn>' + message.role + '\\n' + content }}{% endif %}
        {{- '<end_of_turn>\\n' }}
    {%- else %}{{- '<start_of_turn>' + message.role + '\\n' + content + '<end_of_turn>' + '\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}"""

TOOLS = """{{ bos_token }}{% if tools %}{{ '<start_of_turn>system\\n' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}
{% endif %}
{%- for m in messages %}
{%- if m.role == 'tool' or m.tool_calls is defined %}{{ raise_exception('no tools') }}{% endif %}
{{- '<start_of_turn>' }}{{ m.role }}{{ '\\n' }}
{%- if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}
{{- '<end_of_turn>' }}{% endfor %}{{ '<start_of_turn>model\\n' }}"""

GEMMA_3 = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}{%- set prefix = messages[0]['content'] + '\\n\\n' -%}
    {%- else -%}{%- set prefix = messages[0]['content'][0]['text'] + '\\n\\n' -%}{%- endif -%}
    {%- set rest = messages[1:] -%}
{%- else -%}{%- set prefix = '' -%}{%- set rest = messages -%}{%- endif -%}
{%- for message in rest -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception('roles must alternate') }}{%- endif -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\\n' + (prefix if loop.first else '') }}
    {%- if message['content'] is string -%}{{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}{%- for item in message['content'] -%}{{ item['text'] | trim }}{%- endfor -%}
    {%- endif -%}{{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}"""

MACROS = """{%- macro turn(role, text) -%}<start_of_turn>{{ role }}
{{ text }}<end_of_turn>
{% endmacro -%}
{{ bos_token }}{% for m in messages %}{% set text %}{{ m.content | trim }}{% endset %}{{ turn(m.role, text) }}{% endfor %}
<start_of_turn>model
"""

CUTS = """{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m.role }}
{{ m.content[:2000] | trim }}{% if m.content | length > 20 %} ({{ m.content | length }} characters){% endif %}
{%- if m.content == '' %}(silent){% elif not m.content.strip() %}(blank){% endif %}
{%- if m.content.lstrip().rstrip() != m.content %}!{% endif %}<end_of_turn>
{% endfor %}<start_of_turn>model
"""

LISTS = """{{ bos_token }}{% set out = [] %}{% for m in messages %}
{%- set line %}{{ '<start_of_turn>%s\\n%s<end_of_turn>' | format(m.role, m.content) }}{% endset %}{{ line }}{{ '\\n' }}
{%- endfor %}{{ messages | map(attribute='role') | join(', ') }}{{ '|' }}
{{- messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | join('<unused7>') }}
{{- '<start_of_turn>model\\n' }}"""

REWRITES = """{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' }}{{ m.role | upper }}: {{ m.content | upper }}
{{- m.content.replace('a', '<unused8>').replace('\\n', ' ') }}{{ m.content.split() | join('-') }}
{{- m.content.splitlines() | last | default('none') }}{{ m.content | first | default('x') }}{{ m.content[::-1] }}
{{- m.content.title() ~ m.content.removeprefix('What') ~ m.content.partition(' ')[2] ~ m.content * 2 }}
{{- '<end_of_turn>' }}{% endfor %}<start_of_turn>model
"""

JSON = """{{ bos_token }}<start_of_turn>user
{{ messages | tojson }}{% for m in messages %}{{ m.content | tojson(indent=2) }}{% endfor %}<end_of_turn>
<start_of_turn>model
"""

TRAINED = """{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ '<start_of_turn>model\\n' }}
{%- generation %}{{ m.content }}<end_of_turn>{% endgeneration %}{{ '\\n' }}{% else %}
{{- '<start_of_turn>' + m.role + '\\n' + m.content + '<end_of_turn>\\n' }}{% endif %}{% endfor %}<start_of_turn>model
"""

DROPPED_NEWLINE = """{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + m.content | trim + '<end_of_turn>' }}
{%- endfor %}{{ '<start_of_turn>model\\n' }}"""

ROLES_IN_A_TABLE = """{% set marks = {'user': '<unused1>', 'assistant': '<unused2>', 'system': '<unused3>'} %}{{ bos_token }}
{%- for m in messages %}{% if m.role not in marks %}{% continue %}{% endif %}{{ marks[m.role] + m.content }}
{%- if not loop.last %}{{ ['<end_of_turn>', '\\n'] | join }}{% endif %}{% endfor %}{{ marks.assistant }}"""

LOUD = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content | upper }}\n{% endfor %}model: "

FOLDED = {"alpaca": ALPACA, "gemma without newline": DROPPED_NEWLINE}
NATIVE = {
    "gemma with system": GEMMA_WITH_SYSTEM,
    "vicuna": VICUNA,
    "chatml": CHATML,
    "llama 2": LLAMA_2,
    "llama 3": LLAMA_3,
    "date": DATED,
    "zephyr": ZEPHYR,
    "mistral": MISTRAL,
    "deepseek": DEEPSEEK,
    "qwen 3": QWEN_3,
    "tools": TOOLS,
    "gemma 3": GEMMA_3,
    "macros": MACROS,
    "cuts": CUTS,
    "lists": LISTS,
    "rewrites": REWRITES,
    "json": JSON,
    "generation": TRAINED,
    "roles in a table": ROLES_IN_A_TABLE,
    "loud": LOUD,
}
