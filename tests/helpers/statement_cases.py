"""Templates of completions that state an answer, and of completions that only seem to.

`{a}` is the answer, `{b}` another value, `¶` a line break.
"""

from __future__ import annotations

# The answer is {a}, whatever else is said.
STATED = r"""
The answer is {a}.
The answer is {a}
The answer is: {a}
The answer is therefore {a}.
The answer is ${a}$.
The answer is \({a}\).
The answer is **{a}**.
The answer is `{a}`.
The answer is "{a}".
The final answer is {a}. I hope it is correct.
The final answer is **{a}**.¶¶Would you like me to explain step {b}?
The correct answer is {a} because {b} is too small.
The answer would be {a}.
My answer is {a}.
I think the answer is {a}.
Thus the required answer is {a}.
The answer to the question is {a}.
The answer is {a}, not {b}.
The answer is {a} (not {b}).
The answer is not {b} but {a}.
The answer is {a}, which is what was asked.
The answer is {a} (which is {b} doubled).
The answer is {a}; that is {b} times two.
The answer is {a}, obtained from {b}.
The answer is {a} since {b} fits nowhere.
The answer is {a}. Note that {b} would be wrong.
The answer is {b}. Wait, that's wrong. It should be {a}.
The answer is {b}. No wait, {a}.
The answer is {b}... actually, {a}.
Answer: {a}
ANSWER: {a}
Answer = {a}
Answer (final): {a}
Ans: {a}
**Answer:** {a}
**Answer: {a}**
## Answer: {a}
**Answer**¶¶{a}
### Final Answer¶¶$${a}$$
Final Answer: ${a}$
{"answer": "{a}"}
So {a} is the answer.
{a} is our final answer. It has {b} letters.
This gives a final answer of {a}.
The final result is {a}.
Question: is it {b}? Answer: {a}
<answer>{a}</answer>
<answer>{a}</answer> Done in {b} steps.
<answer>¶${a}$¶</answer>
<answer>The answer is {a}.</answer>
<answer>{a}
<final_answer>{a}</final_answer>
#### {a}
####{a}
#### {b}¶More.¶#### {a}
#### {a}¶Hope it helps with your {b} tasks
We add.¶A: {a}
\boxed{{a}}
$$\boxed{{a}}.$$
\fbox{{a}}
\framebox{{a}}
\framebox[2cm][c]{{a}}
\answer{{a}}
\boxed{\boxed{{a}}}
\boxed{{a}}, not {b}.
\boxed{{a}} is the answer; {b} is not.
\boxed{{a}}¶¶Note: {b} is a common wrong answer.
\boxed{{a}}¶¶Let me know if you need help with Problem {b}!
\boxed{{a}}. Wait, let me double check. Yes.
\boxed{{b}}. Wait, recheck: \boxed{{a}}
\boxed{{b}}. Sorry, I made a mistake; the answer is {a}.
First attempt \boxed{{b}}, final \boxed{{a}}
My first answer was \boxed{{b}}, but that is wrong. The final answer is \boxed{{a}}.
The final answer is \boxed{{a}}, not \boxed{{b}}.
\boxed{{b}} is wrong. The right one is \boxed{{a}}
The answer isn't {b} but {a}.
\boxed{{b}} for the first part, then¶¶**Answer: {a}**
We get \boxed{{b}}, so the answer is {a}.
Put it into \boxed{}. The answer is {a}.
The answer in '\boxed{}' is: \boxed{{a}}.
The answer is in \boxed{} : {a}
Step 1: \boxed{{b}}¶Step 2: \boxed{{a}}
Either \boxed{{a}} or else \boxed{{a}}
The tag `<think>` is not needed. \boxed{{a}}
"""

# The same for a number.
STATED_NUMBER = r"""
We get {a} (not {b}).
{a} ({b} in April and {b} in May)
She sold {a} clips in all that time ({b} in April and {b} in May).
The answer is {a}. If the question were different, the answer would be {b}.
#### {a}¶If it were doubled, the answer would be {b}.
The answer is {a}. Had we used {b} instead, the final answer would have been {b}.
The answer is {a}. Otherwise the answer could be {b}.
The answer is {a}. The answer would be {b} if x were 3.
If she had sold more, the answer would be {a}.
So p = {b}/197 and p+q = {b} + 197 = {a}.
Hence m = {b}, n = 3, so m+n = {a}.
Answer: {a} clips in total
The answer is {a} clips altogether in April and May.
The answer is {a} clips: {b} in April and {b} in May.
The answer is {a} ({b} in April and {b} in May).
The answer is {a}, as {b} + {b} was asked.
The answer is {a} — {b} in each month.
The answer is {a} apples, and this is all.
The answer is {a} apples and it is more than {b}.
The answer is {a} apples, not oranges.
The answer is {a} due to symmetry.
The answer is {a}, by adding {b} to it.
The answer is {a}. ∎
The answer is ${a}$. $\blacksquare$
The answer is {a} ✅
Final Answer: Natalia sold {a} clips.
Natalia has {a} clips.
In all, Natalia and her two friends have sold {a} clips.
So the total number that all of them sold is $${a}$$¶¶I can help you with {b} more questions!
It comes to **{a}** in all.
So $x={a}$.¶¶**Check:** $x - 1 = {b}$ ✓
Thus x = {a}.¶¶Verification: we put in {b}. Correct.
The total of all the numbers is {a}.¶¶Let me know if you have {b} questions!
{a}¶¶Explanation: the first of them is {b}.
\begin{align*} x &= {b}\cdot 1 \\ &= {a} \end{align*}
So, Janet makes {a} daily from selling {b} eggs.
She has {a} left, which is {b} fewer than before.
She earned ${a} in {b} minutes of work.
\boxed{{a}} (that is {b} and some)
"""

STATED_LETTER = r"""
We eliminate the others.¶¶{a}
Therefore¶¶({a})
So it is five.¶**{a}**
Therefore, {a}.
So it's {a}.
I pick {a}.
{a}, because the others are too small.
Option {a} is correct.
Option {a} is the correct answer.
Option {a} is right.
{a} is correct because 5 > 3.
({a}) is the correct choice.
The correct option is {a}) 12.
I would choose option {a}.
We choose ({a}).
{a}) 12 is the correct answer.
Hence the correct choice is $\textbf{({a})}$.
Answer ({a})
The answer is {a}: 12 cm
The answer is **{a}. 12 cm**
Answer: {a} (12 cm)
Answer: option {a}, 12 cm
{b} is wrong. {a} is correct.
\boxed{x^2}¶¶**Answer: {a}**
"""

# {a} is mentioned but not stated: wrong if the gold is {a}.
NOT_STATED = r"""
The answer is {a} or {b}.
The answer is {b} or {a}.
The answer is either {a} or {b}
The answer is {a}, or maybe {b}.
The answer is {a}. Or maybe {b}.
The answer is {b}. Alternatively, {a}.
The answer is {a} and {b}.
The answer is not {a}.
The answer isn't {a}.
The answer cannot be {a}.
The answer is {b}. The answer is not {a}.
The answer is {b}, not {a}.
The answer is {b} (not {a}).
The answer is not {a} but {b}.
{a} is not the answer. {b} is.
If the answer is {a}, we are lost.
Suppose the answer is {a}. Then so be it: the answer is {b}.
The wrong answer is {a}. The correct answer is {b}.
The student answered {a}, but the correct answer is {b}.
The answer is {a} if n is odd and {b} if n is even.
The answer is {b} if n is odd and {a} if n is even.
The answer is {a}. Wait, that's wrong. It should be {b}.
The answer is {a}. No wait, {b}.
The answer is {a}. Wait, that is wrong.
Answer: {a} or {b}
#### {a} or {b}
#### {a}¶#### {b}
<answer>{a}</answer><answer>{b}</answer>
<answer>{a} or {b}</answer>
\boxed{{a}} or \boxed{{b}}
\boxed{{b}}, \boxed{{a}}
\boxed{{a}} and \boxed{{b}}
\boxed{{b}} \text{ (or } \boxed{{a}})
\boxed{{b}} (alternatively \boxed{{a}})
\boxed{{a}} for odd n or \boxed{{b}} for even n
\boxed{{a}} or {b}
{b} or \boxed{{a}}
\boxed{{a} \text{ or } {b}}
\boxed{{b}}. The answer is not {a}.
\boxed{{a}}. Wait, that's wrong.
\boxed{{a}} is incorrect.
It is not \boxed{{a}}.
First attempt \boxed{{a}}, final \boxed{{b}}
\boxed{{a}} was my first attempt; the final answer is \boxed{{b}}
The answer is \boxed{{b}}, not \boxed{{a}}.
\boxed{{a}}? No, that is wrong: \boxed{{b}}
\boxed{{a}} \boxed{}
\boxed{your answer} {a}
\boxed{{a}
\boxed{{b}}<|im_end|>\boxed{{a}}
"""

NOT_STATED_NUMBER = r"""
She sold {b} clips in all that time ({a} in April and {a} in May).
They sold {a} boxes on each of the days (so {b} in total).
The answer is {b}. If the question were different, the answer would be {a}.
\boxed{{b}}. If x had been 3, the answer would have been {a}.
The answer is given in step {a}.
The answer follows from equation ({a}).
So p = {a}/197 and p+q = {a} + 197 = {b}.
She has either {a} or {b} apples left in the basket today.
She has either {b} or {a} apples left in the basket today.
It is between {b} and {a} in all the cases that we looked at.
I think that it comes to at least {a} in this particular case here
In the end the result is negative {a} for this one problem of ours
That would be half of {a} in this very long sentence of ours
So in this case we find that {a} is incorrect
So in this case we find that {a} does not work
We find that it is {a} million for this company in the end
It is clear that this is not {a} in the end of this task
The answer is at least {a}.
The answer is wrong: {a}.
If the answer is {a}, then we are lost.
The answer is {a} or more.
The answer is twice {a}.
The answer is {a} (in thousands).
The answer is {a}{a}.
The answer is -{a}.
Answer: {a}+{a}={b} clips
So $x={b}$.¶¶Check: $x - 1 = {a}$ ✓
The answer is {b}. Let me know if you have {a} questions!
"""

NOT_STATED_LETTER = r"""
Option {a} is incorrect.
Option {a} is not correct.
Option {b} is correct.
(A) 1 (B) 2 (C) 3 (D) 4
A. 1¶B. 2¶C. 3¶D. 4
A¶B¶C¶D
{a} pretty girl waves
The answer is: {a} bird in the hand.
I rule out {a}. The answer is {b}.
"""

# Labels and endings in other languages.
LANGUAGES = r"""
答案是{a}。
答案：{a}
答案为：${a}$。
因此，答案是 **{a}**。
所以答案应为{a}。
最终答案：{a}
答えは{a}です。
答え：{a}
よって、答えは ${a}$ です。
したがって正解は{a}である。
정답은 {a}입니다.
답: {a}
따라서 답은 {a}이다.
Ответ: {a}
Ответ: {a}.
**Ответ:** {a}
Итак, ответ равен {a}.
Ответ — {a}.
Відповідь: {a}
Respuesta: {a}
La respuesta es {a}.
La respuesta final es ${a}$.
**Respuesta final:** {a}
Réponse : {a}
La réponse est {a}.
La réponse finale est {a}.
Antwort: {a}
Die Antwort lautet {a}.
Die Antwort ist {a}.
Die endgültige Antwort ist **{a}**.
A resposta é {a}.
Resposta: {a}
La risposta è {a}.
Risposta: {a}
Het antwoord is {a}.
Odpowiedź: {a}
Svar: {a}
Vastaus: {a}
Răspuns: {a}
Válasz: {a}
Απάντηση: {a}
Cevap: {a}
Đáp án: {a}
Đáp số: {a}
Jawaban: {a}
Jawabannya adalah {a}.
उत्तर: {a}
उत्तर {a} है।
अंतिम उत्तर {a} है।
উত্তর: {a}
الجواب: {a}
الجواب هو {a}.
الإجابة النهائية هي {a}.
پاسخ: {a}
תשובה: {a}
คำตอบคือ {a}
Ответ: {a} руб.
Respuesta: {a} dólares
答案是{a}米。
答：小明有{a}个苹果。
所以，小明一共有{a}个苹果。
따라서 {a}개입니다.
"""

LANGUAGES_LETTER = r"""
正确选项为{a}。
故选{a}。
故选：{a}
所以选 {a}
因此答案选{a}
正确答案是 ({a})。
Правильный ответ: {a}
La respuesta correcta es {a}.
La respuesta es la {a}.
A resposta correta é a letra {a}.
本题选{a}。
"""

LANGUAGES_NOT_STATED = r"""
答案不是{a}。
答案是{a}或{b}。
答案是{a}以上。
小明有{b}或{a}个苹果。
Ответ: не {a}
Ответ: {a} или {b}.
La respuesta no es {a}.
Die Antwort ist nicht {a}.
La réponse n'est pas {a}.
"""

# (opening, closing) tags of thinking, as models write them.
THINKING = [
    ("<think>", "</think>"),
    ("<think>\n", "\n</think>\n\n"),
    ("<THINK>", "</THINK>"),
    ("<thinking>", "</thinking>"),
    ("<thinking>", "</think>"),
    ("<thought>", "</thought>"),
    ("<reasoning>\n", "\n</reasoning>\n"),
    ("<reasoning effort='high'>", "</reasoning>"),
    ("<scratchpad>", "</scratchpad>"),
    ("<analysis>", "</analysis>"),
    ("<reflection>", "</reflection>"),
    ("<mm:think>", "</mm:think>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel>thought\n", "<channel|>"),
    (
        "<|channel|>analysis<|message|>",
        "<|end|><|start|>assistant<|channel|>final<|message|>",
    ),
    (
        "<|channel|>analysis<|message|>",
        "<|end|><|start|>assistant<|channel|>commentary<|message|>\\boxed{9}<|end|>"
        "<|start|>assistant<|channel|>final <|constrain|>text<|message|>",
    ),
    ("analysisWe think: ", "assistantfinal"),
]


def templates(*tables: str) -> list[str]:
    """The templates of the tables, with real line breaks."""
    lines = [line for table in tables for line in table.strip("\n").split("\n")]
    return [line.replace("¶", "\n") for line in lines]


def fill(template: str, answer: str, other: str) -> str:
    """The completion for a template and two values."""
    return template.replace("{a}", answer).replace("{b}", other)
