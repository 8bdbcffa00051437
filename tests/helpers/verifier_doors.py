"""Authored for the verifier: pairs equal and unequal by kind of trick, and golds to change."""

from __future__ import annotations

OPEN = r"""
45 \text{ km/h} | 12.5 \text{ m/s}
45 km/h | 12.5 m/s
3 h 20 min | 200 min
3 \text{ h } 20 \text{ min} | 200 \text{ minutes}
5 m/s | 5 \text{ m/s}
200 minutes | 3 hours and 20 minutes
-5 | negative 5
-5 | minus 5
-5 | negative five
5/2 | half of 5
\sqrt{5} | the square root of 5
\sqrt[3]{5} | the cube root of 5
25 | 5 squared
25 | the square of 5
125 | 5 cubed
x<5 | less than 5
5.5 | 5 and a half
5.5 | five and a half
60 | 5 dozen
x \ge 5 | 5 or more
x \ge 5 | no less than 5
x \ge 5 | x is at least 5
x > 5 | more than 5
x>5 | x is greater than 5
x \ge 5 | greater than or equal to 5
x \le 5 | at most 5
x \ne 5 | not equal to 5
5 | x is 5
5 | the answer is 5
5 | The number of solutions is 5
5 | 5 is the answer
5 | there are 5
5 | about 5
5 | exactly 5
1/2 | half
1/2 | one half
3/4 | three quarters
1/5 | the reciprocal of 5
120 | 5 factorial
10 | twice 5
5 \text{ J} | 5 \text{ N m}
5 N | 5 \text{ newtons}
2 \text{ kW} | 2000 \text{ W}
1 \text{ L} | 1000 \text{ cm}^3
\$5 | 500 \text{ cents}
\$5 | 5 \text{ dollars}
9.8 \text{ m/s}^2 | 9.8 \frac{m}{s^2}
9.8 \text{ m/s}^2 | 9.8 m s^{-2}
9.8 \text{ m/s}^2 | 9.8\, m/s^2
9.8 \text{ m/s}^2 | 9.8 \text{ meters per second squared}
36 km/h | 10 \, \mathrm{m\,s^{-1}}
5 \text{ apples} | 5 apples
1 \text{ hour} | 60 \text{ min}
1 \text{ hour} | 3600 s
60 \text{ km/h} | 1 \text{ km/min}
30^\circ | 30 \text{ degrees}
\pi/6 \text{ rad} | 30^\circ
6\text{ feet} | 72 \text{ inches}
5 \text{ ft } 6 \text{ in} | 66 \text{ inches}
-3 \text{ degrees Celsius} | -3^{\circ}C
x\equiv 2 (5) | x \equiv 7 \pmod 5
x\equiv 2 \pmod{5} | x \equiv -3 (mod 5)
x\equiv 2 \pmod{5} | 2 \pmod 5
x\equiv 2 \pmod{5} | x = 5k+2
x\equiv 2 \pmod{5} | x \equiv 2 \mod 5
n \equiv 1 \text{ or } 3 \pmod 4 | n \equiv 1, 3 \pmod 4
(0,2) | x>0 \text{ and } x<2
(0,2) | x>0, x<2
|x|<2 | (-2,2)
|2x-1| \le 3 | [-1,2]
|x|+1<3 | (-2,2)
|x|>1 | (-\infty,-1)\cup(1,\infty)
|x-1|<2 | -1<x<3
x^2 < 4 | (-2,2)
x^2 \ge 4 | x \le -2 \text{ or } x \ge 2
v_0^2 | v^2_0
f'g + fg' | g f' + g' f
y'x | x y'
\mathbb{R}-\{1\} | x \ne 1
(-\infty,1)\cup(1,\infty) | (-\infty,1) U (1,\infty)
(-\infty,1)\cup(1,2)\cup(2,\infty) | x \ne 1, 2
(-\infty,1)\cup(1,2)\cup(2,\infty) | R - \{1,2\}
1500 | 1.5 x 10^3
0.0015 | 1.5 x 10^{-3}
\pm 7 | +-7
\pm 7 | +/-7
\begin{pmatrix}1&2\\3&4\end{pmatrix} | [[1,2],[3,4]]
120 | 10C3
120 | C(10,3)
120 | {}^{10}C_{3}
720 | {}_{10}P_3
\gcd(x+1,n) | \gcd(n,1+x)
y=Ce^x | y=Ke^x
y = C_1 e^x + C_2 e^{-x} | y = A e^x + B e^{-x}
|x| | \begin{cases} x & x\ge0 \\ -x & x<0\end{cases}
|x| | \begin{cases} x & \text{if } x>0 \\ -x & \text{otherwise}\end{cases}
1234567 | 12,34,567
1000000 | 1.000.000
1000000.5 | 1.000.000,5
1234567 | 1'234'567
293 | m+n = 293
293 | m+n = 256+37 = 293
\sqrt2 | \Delta p = \sqrt2
1/2 | \frac{AB}{CD} = 1/2
\{1,2,3\} | \{n \in \mathbb{Z} : 0<n<4\}
\{1,2,3\} | \{n : n \in \mathbb{N}, n<4\}
AB=5 | BA=5
AB=5 | |AB| = 5
AB = 5 | \overline{AB} = 5
f(x)=2x | y=2x
P(A)=0.3 | 0.3
\angle ABC=30^\circ | \angle CBA = 30^\circ
\text{no solution} | no solutions exist
5 | five (5)
5 | 5 (five)
12 | 12 \text{ sq units}
\{\{1\},\{2\}\} | \{\{2\},\{1\}\}
A | (A) 5
no | No, it is not.
-5 | the negative of 5
-1/2 | negative one half
1/4 | a quarter
5 | 5 (exactly)
7 | the total is 7 units
\frac{\sqrt{2}}{2} | one over the square root of 2
x>3 | x must be greater than 3
x \geq -2 | x is greater than or equal to -2
x \le 4 | 4 or less
n \ge 3 | n is at least 3
[3,\infty) | at least 3
(-\infty,3) | less than 3
25\% | 25 percent
0.25 | 25 percent
12 | a dozen
24 | two dozen
3000 | 3 thousand
2500000 | 2.5 million
100 \text{ km/h} | 100 \text{ kilometers per hour}
100 \text{ km/h} | 100 kph
20 \text{ m/s} | 72 \text{ km/h}
20 \text{ m/s} | 72 \, \text{km}/\text{h}
20 \text{ m/s} | 20 \, \mathrm{m}/\mathrm{s}
20 \text{ m/s} | 20\ \mathrm{m \cdot s^{-1}}
5 \times 10^3 \text{ N} | 5 \text{ kN}
1.5 \text{ hours} | 90 \text{ minutes}
1 \text{ h } 30 \text{ min} | 90 \text{ min}
1 hour 30 minutes | 1.5 hours
2 \text{ weeks} | 14 \text{ days}
3 \text{ dozen} | 36
100 \text{ cm} | 1 \text{ m}
2 \text{ m}^2 | 20000 \text{ cm}^2
5 \text{ ft} | 5 \text{ feet}
6 \text{ feet } 2 \text{ inches} | 74 \text{ inches}
180^\circ | \pi \text{ radians}
180^\circ | \pi
\$2.50 | 250 \text{ cents}
\$2.50 | 2.50 \text{ dollars}
25 \text{ mph} | 25 \text{ miles per hour}
37^\circ\text{C} | 37 \text{ degrees Celsius}
37^{\circ}\mathrm{C} | 37°C
1000 \text{ kg/m}^3 | 1 \text{ g/cm}^3
8.5 \text{ g} | 8500 \text{ mg}
5 \text{ V} | 5 \text{ volts}
3 \Omega | 3 \text{ ohms}
4.2 \text{ kJ} | 4200 \text{ J}
50 \text{ Hz} | 50 \text{ s}^{-1}
x\equiv 3\pmod 7 | x\equiv 10\pmod 7
x\equiv 3\pmod 7 | x = 3 + 7k, k \in \mathbb{Z}
x\equiv 3\pmod 7 | x = 7n+3
x\equiv 3\pmod{7} | x \equiv -4 \bmod 7
x \equiv 1,4 \pmod 5 | x \equiv 1 \text{ or } 4 \pmod 5
x \equiv \pm 1 \pmod 5 | x \equiv 1, 4 \pmod 5
(-\infty,-1)\cup(1,\infty) | |x|>1
[-3,3] | |x| \le 3
[-3,3] | x^2 \le 9
(1,5) | |x-3|<2
(0,2) | 0<x \text{ and } x<2
(0,2) | x \in (0,2)
(-\infty,0)\cup(2,\infty) | x<0 \text{ or } x>2
\{2,3,4\} | \{x \in \mathbb{Z} \mid 2 \le x \le 4\}
\{1,2,3,4\} | \{n\in\mathbb{N} : n<5\}
\{-1,0,1\} | \{x\in\mathbb{Z} : |x|<2\}
\{-1,0,1\} | \{x\in\mathbb{Z} : x^2<4\}
(-\infty, 2) \cup (2, \infty) | x \neq 2
(-\infty, 2) \cup (2, \infty) | \mathbb{R}\setminus\{2\}
(-\infty, 2) \cup (2, \infty) | \mathbb{R} - \{2\}
(-\infty, 2) \cup (2, \infty) | all real numbers except 2
(-\infty, 2) \cup (2, \infty) | x \in \mathbb{R}, x \ne 2
(-\infty, 2) \cup (2, \infty) | \{x \in \mathbb{R} : x \ne 2\}
x_1^2 + x_2^2 | x^2_1 + x^2_2
a'b + ab' | ab' + a'b
y''+y'=0 | y'+y''=0
6.02 \times 10^{23} | 6.02 x 10^23
6.02 \times 10^{23} | 6.02 X 10^{23}
3 \pm 2 | 5, 1
\pm 3 | +/- 3
\pm\sqrt{2} | +-sqrt(2)
\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} | [[1, 2], [3, 4]]
\begin{pmatrix} 1 \\ 2 \end{pmatrix} | [1, 2]
\begin{pmatrix} 1 \\ 2 \end{pmatrix} | [[1],[2]]
35 | 7C3
35 | C(7,3)
35 | ^7C_3
35 | {}^7C_3
35 | \,_7C_3
210 | 7P3
35 | \mathrm{C}_7^3
\gcd(a,b) | \gcd(b,a)
\text{lcm}(a,b) | \text{lcm}(b,a)
\max(a,b) | \max(b,a)
Ce^{2x} | Ke^{2x}
y=Ce^{-x}+x | y=Ae^{-x}+x
y=C_1\cos x+C_2\sin x | y=c_1\cos x+c_2 \sin x
y=C_1\cos x+C_2\sin x | y=A\cos x+B \sin x
|x| | \begin{cases} x & \text{if } x \ge 0 \\ -x & \text{if } x < 0 \end{cases}
f(x)=|x| | f(x)=\begin{cases} x, & x \ge 0 \\ -x, & x < 0 \end{cases}
|x-1| | \begin{cases} x-1, & x \ge 1 \\ 1-x, & x < 1 \end{cases}
1234567 | 1,234,567
1234567 | 1 234 567
1234567 | 1.234.567
1234567.89 | 1.234.567,89
1234567.89 | 1'234'567.89
1234567 | 12,34,567
P(A) = \frac13 | P(A)=1/3
\angle A = 30^\circ | \angle A=30
\vec{a}=(1,2) | \vec a = (1,2)
\bar{x} = 5 | \bar x=5
v_0^2/2g | \frac{v^2_0}{2} g
\text{no real solutions} | no solution
\text{undefined} | undefined
A | \text{A}
A | (A)
A | A.
A | Option A
yes | Yes, because it holds.
1/2 | 0.5
\log_{10} x | \lg x
21 | twenty-one
21 | Twenty-one apples
105 | one hundred and five
105 | one hundred five
342 | three hundred and forty-two
1200 | one thousand two hundred
2005 | two thousand and five
2/3 | two thirds
2/3 | two-thirds
1/5 | one-fifth
100 | a hundred
101 | a hundred and one
0.6 | sixty percent
200000 | two hundred thousand
42 cm^2 | 42 sq. cm
42\text{ cm}^2 | 42 square cm
42 cm^3 | 42 cu cm
42 square feet | 42 sq. ft.
42 | 42 sq. cm
12 cubic inches | 12 in^3
12 cu. in. | 12\text{ in}^3
"""

SHUT = r"""
1 | one hundred and one
100 | one hundred and one
21 | twenty and one
100,5 | one hundred and five
5 | 5 maximum
5 | 5 max
5 | 5 too many
5 | 5 if x > 0
5 | 5 when x \ge 1
5 | 5 when n is odd
5 | 5 too few
5 | 5th
42 cm | 42 sq. cm
42 cm | 42 square cm
42 cm^2 | 42 sq. m
12 in^2 | 12 in^3
2^{n}-1 | 2^{n-1}
e^{x+1} | e^x+1
\sqrt{5}+1 | \sqrt{5+1}
\frac{1}{2}x | \frac{1}{2x}
\{x \mid x>1\} | \{x\} \mid x>1
a_{n+1} | a_{n}+1
\text{x}_{1}2 | \text{x}_{12}
5 | negative 5
5 | less than 5
5 | at least 5
5 | half of 5
5 | the square root of 5
5 | 5 squared
5 | not equal to 5
5 | 5 is incorrect
5 | minus 5
5 | twice 5
5 | double 5
5 | 5 or more
5 | more than 5
5 | up to 5
5 | no more than 5
5 | anything but 5
5 | all but 5
5 | everything except 5
5 | other than 5
5 | divisible by 5
5 | a multiple of 5
5 | a divisor of 5
5 | a factor of 5
5 | powers of 5
5 | 5 factorial
5 | 5 cubed
5 | the reciprocal of 5
5 | the opposite of 5
5 | 5 dozen
5 | 5 million
5 | 5 hundredths
5 | 5 is wrong
5 | 5 is false
5 | 5 is not the answer
5 | 5 does not work
5 | 5 isn't right
5 | I doubt it is 5
5 | it is never 5
5 | 5 in base 7
5 | 5 by 7
5 | 5 from 7
5 | 5 out of 7
5 | 5 plus a bit
5 | 5 minus one
5 | 5 times two
5 | 5 and something
5 | one more than 5
5 | one less than 5
5 | five less than x
5 | a third of 5
5 | two thirds of 5
5 | 5 halves
5 | 5 thirds
5 | 5 tenths
5 | the fifth root of 5
5 | the logarithm of 5
5 | the sum of 5
5 | between 4 and 5
5 | nearly 5
5 | almost 5
5 | close to 5
5 | 5 at most
5 | 5 at least
5 | 5 or fewer
5 | maybe 5
5 | 5?? no
5 | not 5
5 | non-5
5 | the inverse of 5
5 | 5 to the power 3
5 | the 5th prime
5 | log of 5
5 | the digits of 5
5 | the complement of 5
5 | the derivative of 5
5 | the absolute value of -6 is not 5
-5 | the absolute value of -5
y=x | y=|x|
|x|<2 | x<2
f(x)=|x|+1 | f(x)=x+1
f(x)=\max(x,0) | f(x)=x
y=x | y=\min(x,100)
y=\sqrt{x^2} | y=x
y = x^2 | y = x|x|
y=\lfloor x \rfloor | y=\lceil x \rceil - 1
y=x | y = \sqrt[4]{x^4}
x^2 < 4 | x < 2
x^2 > 4 | x > 2
|x| > 0 | x > 0
x^3 < 8 | |x|^3 < 8
\sqrt{x} < 2 | x < 4
45 \text{ km/h} | 45 \text{ m/s}
45 km/h | 45 m/s
5 N | 5 J
5 \text{ N} | 5 \text{ J}
3 apples | 3 oranges
3 \text{ apples} | 3 \text{ oranges}
5 \text{ kg} | 5 \text{ lb}
5 \text{ m/s} | 5 \text{ m/s}^2
5 \text{ m} | 5 \text{ apples}
5 \text{ miles per hour} | 5 \text{ miles}
€5 | \$5
£5 | \$5
5 \text{ euros} | 5 \text{ dollars}
20^\circ C | 20^\circ F
20^\circ C | 20^\circ
5 \text{ kPa} | 5 \text{ Pa}
5 \text{ mg} | 5 \text{ Mg}
3 \text{ hours} | 3 \text{ days}
5 \text{ people per day} | 5 \text{ people}
\sin x=1/2 | \cos x=1/2
P(A)=0.3 | P(B)=0.3
P(X \ge 1) = \frac{3}{4} | P(X \ge 8) = \frac{3}{4}
P(X=1)=0.3 | P(X=2)=0.3
\bar z=i | z=i
\hat p=0.3 | p=0.3
\tilde x = 2 | x = 2
\angle ABC=30 | \angle ACB=30
x=3 | y=3
AB=5 | CD=5
AB=5 | AC=5
f(x)=x | g(x)=x
f(2)=5 | f(3)=5
f(2)=5 | g(2)=5
E(X)=2 | V(X)=2
a_1=5 | a_2=5
x=1,y=2 | a=1,b=2
\log x=2 | \log y=2
Alice: 5 | Bob: 5
Alice is 5 | Bob is 5
maximum value is 2 | minimum value is 2
Area = 6 | Perimeter = 6
S_{10}=5 | S_{11}=5
\frac{AB}{CD}=2 | \frac{AC}{BD}=2
m+n=5 | m-n=5
m+n=5 | p+q=5
x<0 or x>2 | x<0 and x>2
p\land q | p\lor q
p \land q | p, \text{ or } q
\text{Alice and Bob} | \text{Alice or Bob}
x\equiv 2 (5) | x\equiv 2 (7)
x\equiv 2 (5) | 2
x\equiv 2 (5) | x = 2
x\equiv 2 (5) | x\equiv 3 (5)
x\equiv 2 \pmod 5 | y\equiv 2 \pmod 5
x\equiv 2 \pmod 5 | x=7k+2
x\equiv 2 \pmod 5 | x\equiv 2
n\equiv 1 \pmod 3 | n \equiv 1 \pmod 4
A | C. A pretty girl waves
A | A pretty girl waves
no | no, wait, yes
yes | yes, no
yes | Yes and no
true | true, but actually false
no | no, yes
\{\{1\},\{2\}\} | \{1,2\}
\{\{1\}\} | \{1\}
\{1,\{2\}\} | \{1,2\}
\{\emptyset\} | \emptyset
1.2 | 1,2
12.5 | 12,5
3.14 | 3,14
12 | 1,2
1/3 | 0.333
2/3 | 0.667
1000 | 1.000
\begin{cases} x & x>0 \\ -x & x<0 \end{cases} | \begin{cases} x & x<0 \\ -x & x>0 \end{cases}
p \to q | p \leftrightarrow q
a \perp b | a \parallel b
A_1 \cup A_2 | A_1 \cap A_2
|x| | \begin{cases} x & x\ge0 \\ x & x<0\end{cases}
y=Ae^x | y=Be^x
V = \frac13 Ah | V = \frac13 Bh
10C3 | 10P3
x^2 for x>0 | x^2 for x<0
\begin{cases} x & x>0 \\ 1 & x<0 \end{cases} | \begin{cases} x & x<0 \\ 1 & x>0 \end{cases}
y = x^2, x>0 | y=x^2, x<0
5 | minus five
5 | five squared
5 | twice five
5 | half of ten and 5
5 | 5 less than x
5 | 5 more than x
5 | x + 5
5 | it's not 5
5 | neither 4 nor 5
5 | 5 to 6
5 | 4 to 5
5 | from 1 to 5
5 | 5-6
5 | 5, give or take
5 | 5 plus or minus 1
5 | 5/0
5 | greater than 5
5 | strictly less than 5
5 | a number less than 5
5 | any number except 5
5 | all numbers except 5
5 | any number other than 5
5 | not divisible by 5
5 | a number divisible by 5
5 | 5 and 6
5 | the fifth power of 5
5 | 5 raised to the third power
5 | 5 over 2
5 | 5 divided by 2
5 | 5 multiplied by 2
5 | ten minus 5
5 | the square root of 5 squared plus 1
5 | 5 or infinitely many
5 | possibly 5
5 | perhaps 5
5 | about half of 5
5 | under 5
5 | over 5
5 | above 5
5 | 5 degrees below zero
5 | 5 below zero
5 | 5 short of 10
5 | 5 percent of 10
5 | the sine of 5
5 | the cube of 5
5 | five and a half
5 | a fifth
5 | one fifth
5 | the answer isn't 5
5 | the answer cannot be 5
5 | wrong: 5
5 | 5, which is wrong
5 | 5 is too small
5 | 5 is too large
5 | 5 is impossible
5 | 5 fails
5 | ruled out 5
5 | exclude 5
5 | excluding 5
5 | remove 5
5 | the number after 5
5 | next after 5
5 | 5 base 6
5 | opposite of 5
5 | -five
12 | 12 dozen
5 | 5 hundred
5 | 5k
5 \text{ km/h} | 5 \text{ mph}
5 \text{ g} | 5 \text{ kg}
5 \text{ cm} | 5 \text{ inches}
5 \text{ W} | 5 \text{ J}
5 \text{ V} | 5 \text{ A}
5 \text{ mA} | 5 \text{ MA}
5 \text{ dollars} | 5 \text{ euros}
5 \text{ cats} | 5 \text{ dogs}
5 \text{ red balls} | 5 \text{ boxes}
5 \text{ m/s} | 5 \text{ s/m}
5 \text{ m/s} | 5 \text{ m s}
5 \text{ kg} | 5 \text{ kg/m}
5 \text{ hours} | 5 \text{ hours per day}
5 \text{ degrees} | 5 \text{ radians}
30^\circ | 30 \text{ radians}
20^\circ C | 20 \text{ K}
5 \text{ m} | 5 \text{ m}^2
5 \text{ cm}^2 | 5 \text{ cm}^3
5 \text{ thousand} | 5 \text{ million}
\tan x = 1 | \cot x = 1
\ln x = 2 | \log_2 x = 2
P(A|B)=0.3 | P(B|A)=0.3
P(A \cup B)=0.3 | P(A \cap B)=0.3
AB=3 | BC=3
|AB|=3 | |CD|=3
\triangle ABC = 5 | \triangle ABD = 5
\vec{a}=(1,2) | \vec{b}=(1,2)
\dot{x}=2 | x=2
x'=2 | x=2
f'(x)=2x | f(x)=2x
f'(2)=3 | f(2)=3
f^{-1}(x)=2x | f(x)=2x
a_n=2n | b_n=2n
S_n=n^2 | a_n=n^2
x_A=3 | x_B=3
\alpha=3 | \beta=3
A=3 | B=3
\mu=3 | \sigma=3
Var(X)=3 | E(X)=3
\sin A=3/5 | \sin B=3/5
y=x^2 | y=x|x|
y=\sqrt{x^2} | y = x
y=x^{2/3} | y = x^{1/3}
y=|x|-x | y=0
y=\text{sgn}(x) | y=1
f(x)=\min(x,1) | f(x)=x
f(x)=|x+2| | f(x)=x+2
f(x)=\frac{|x|}{x} | f(x)=1
y=(x^2)^{1/2} | y=x
|x|\le 3 | x\le 3
|x|=2 | x=2
x^2=4 | x=2
x^2=4 | 2
x^4=16 | x^2=4
x^2\ge 1 | x \ge 1
x<1 \text{ and } x>3 | x<1 \text{ or } x>3
(A \cap B) \cup C | A \cap (B \cup C)
p \Rightarrow q | q \Rightarrow p
p \Rightarrow q | p \Leftrightarrow q
\neg p | p
\neg(p \land q) | \neg p \land q
\forall x\, P(x) | \exists x\, P(x)
\text{A and B} | \text{A or B}
x\equiv 3\pmod 7 | x\equiv 3\pmod 8
x\equiv 3\pmod 7 | x\equiv 4\pmod 7
x\equiv 3\pmod 7 | 3
x\equiv 3\pmod 7 | x=3
x\equiv 3\pmod 7 | x = 3k+7
3 \pmod 7 | 3 \pmod 8
a \equiv b \pmod n | a \equiv b \pmod m
B | B. None, the answer is C
A | A cat
A | A or B
B | Be careful
C | C is wrong
yes | yes and no
yes | yes? no
true | not true
false | false or true
\{1,2\} | \{\{1,2\}\}
\{\{1\}\} | \{1\}
\{(1,2)\} | \{(2,1)\}
\{\{1,2\},3\} | \{1,2,3\}
\{1\} | \{\{1\}\}
\{\} | \{\{\}\}
1.5 | 1,5
3.75 | 3,75
15 | 1,5
1/3 | 0.333
1/6 | 0.167
2/9 | 0.222
1000 | 1.000
1/3 | 0.33
10C3 | 10C4
\binom{10}{3} | \binom{10}{4}
\begin{pmatrix}1&2\\3&4\end{pmatrix} | [[1,3],[2,4]]
v_0^2 | v_0
Ce^x | Ce^{-x}
y=Ce^x | y=Ce^{2x}
2^{n+1} | 2^n+1
\frac{x+1}{2} | x+\frac{1}{2}
\sqrt{x+1} | \sqrt{x}+1
e^{-x^2} | e^{(-x)^2}
\log_2{x}+1 | \log_2{(x+1)}
(x+1)^{2} | x+1^{2}
\frac{1}{n+1} | \frac{1}{n}+1
\binom{n+1}{2} | \binom{n}{2}+1
a^{b}c | a^{bc}
\sin{2x} | \sin{2}x
\overline{ab} | \overline{a}b
"""

# Each a value that no change of `mutations` leaves as it is.
GOLDS = r"""
2^{n}-1
3^{2k+1}
e^{x+1}
e^{2x}+3
\sqrt{5}+1
2+\sqrt{n+1}
\frac{1}{2}x
\frac{x+1}{x-3}
\frac{n(n+1)}{2}
x^{2}y-4
a_{n+1}
a_{n}+2
\ln{x}+1
\ln{2x+1}
\log_{2}(n+3)
\sin{x}+2
\cos^{2}x
3\tan(x+1)
\sum_{k=1}^{n}a_k+1
\binom{n}{3}+2
x^{1/2}+7
10^{12}-1
2^{2024}-1
(x+1)^{3}
x^{4}-5x^{2}+4
\frac{\sqrt{3}}{2}-1
\sqrt[3]{x+2}
\lfloor n/2\rfloor+1
|x-2|+3
1-\frac{1}{e^{2}}
(2, 7)
[3, 8)
(-4, 5]
[1, 9]
(2, -3, 5)
\{2, 5, 9\}
12, 17
3+4i
7 \text{ cm}
12 \text{ inches}
45 \text{ km/h}
3 \text{ hours}
8 \text{ apples}
5 \text{ dollars}
x=7
n=12
y=3x-4
x^{2}+y^{2}=9
2x+3y=7
x<5
2<x<9
x \equiv 2 \pmod{7}
n \equiv 4 \pmod{9}
f(x)=2x+5
g(t)=t^{2}-3
\begin{pmatrix}1&2\\3&4\end{pmatrix}
204_{5}
25\%
3:7
42
-17
3.25
1234
\frac{7}{12}
-\frac{5}{8}
2\frac{1}{3}
\frac{3\pi}{4}
30^\circ
2\sqrt{7}
\frac{a+b}{c}
mx+b
\frac{v^{2}}{2g}
p^{2}q-r
u-\frac{w}{t}
"""
