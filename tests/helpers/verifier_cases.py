"""Authored cases for the verifier, one `gold | answer` a line: equal, unequal, tricks."""

from __future__ import annotations

EQUAL = r"""
\sqrt{\frac{3}{4}} | \frac{\sqrt3}{2}
7 | \boxed 7
7 | \fbox{7}
8\sqrt6 | oxed{8\sqrt6}
1234 | 1 234
14916 | 14{,}916
32349 | 32,\!349
1234 | 1\,234
7425000 | 7,425,000
4 | 004
7 | +7
2^{2025} | 2^{2025}
4 | .4e1
0.4 | .4
1000.99 | 1000,99
0.111 | 0,111
1/432 | 2.314814814815 \times 10^{-3}
1500 | 1.5e3
100 | 1E2
602000000000000000000000 | 6.02\cdot10^{23}
50/3 | 16.\overline{6}
50/3 | 16.67
7/3 | 2.\overline{3}
1/6 | 0.1\overline6
7/3 | 2.\dot3
1/2 | \frac12
1 | \frac3{3}
1/2 | \frac 1 2
1/2 | \tfrac{1}{2}
13/4 | (13)/(4)
3/4 | 3:4
5/2 | \frac{10}{4}
3/2 | 1 1/2
3/2 | 1\frac12
-3/2 | -1\frac12
28\% | 28 percent
28\% | 28 pct
28\% | $28$ %
0.335 | 33.5\%
50\% | 50
1/2\% | 0.5\%
15\mbox{ cm}^2 | 15
125\textnormal{ miles} | 125
10 weeks | 10weeks
10 cm^2 | 10 cm^2
1000.99 | $1,000.99
15000 | \$15,\!000
1000.99 | 1,000.99€
0.06 \text{ yuan} | 0.06
15 | 15th Day
12 | 12^{\mathrm{th}}
500 \text{ cm} | 5 \text{ m}
90^\circ | 90
74° | 74^{\circ}
18.8^{\circ} | 18.8
60^\circ 42' | 60.7^\circ
\pi/6 | 30^\circ
20:34 | 08:34 P.M.
204_5 | 204_{5}
\sqrt3 | \sqrt 3
96-10\sqrt{21} | (5\sqrt{3}-\sqrt{7})^2+14
\tan^2y+1 | \sec^2y
2\arcsin\sqrt a | \arccos(1-2a)
\lg 100 | 2
1\pm\sqrt{19} | 1+\sqrt{19}, 1-\sqrt{19}
\{1\pm\sqrt5,-2\} | -2, 1+\sqrt5, 1-\sqrt5
(\pm\sqrt2,0,\pm3) | (\sqrt2,0,3),(\sqrt2,0,-3),(-\sqrt2,0,3),(-\sqrt2,0,-3)
(1,\frac92) | (1, 4.5)
\{1,3\} | 3, 1
(0;-2;0),(0;0;6) | (0,-2,0),(0,0,6)
1,2,3 | $1$ and $2$ and $3$
21,11 | 21 \text{ or } 11
\{1,2,3\} | {1,2,3}
①②③ | 1, 2, 3
2, 3 | ②③
b<a<d<c | b, a, d, c
11111111100 | 11,\! 111,\! 111,\! 100
[-1,-\frac12)\cup(0,1) | [-1,-0.5) \cup (0,1)
(-\infty,-3)\cup(3,\infty) | (-∞, -3) ∪ (3, +∞)
x\in[-2,7] | [-2,7]
\{x\mid x<\frac32\}-\{-6\} | (-\infty,-6)\cup(-6,\frac32)
k<-5 | (-\infty,-5)
3<\lambda\le4 | (3,4]
4<m\le8 \text{ or } 10\le m<12 | (4,8]\cup[10,12)
\{x|-2<x<3\} | (-2,3)
-x>-1 | x<1
x=5 | 5
5=x | 5
2x+4y-3=0 | y=-\frac12x+\frac34
x^2/4+y^2/3=1 | 3x^2+4y^2=12
z=1+1=2 | 2
W(n)=1 \text{ or } W(n)=-1 | 1,-1
AB=4,CD=5 | 4,5
2,4 | T(10)=2, T(11)=4
f(x)=2x | f(z)=2z
k\pi | n\pi, n\in\mathbb{Z}
k\pi | n\pi (n \in \mathbb{Z})
(-32+3x,64-5x) | (-32+3t,64-5t)
\frac\pi6+\pi k | \frac{\pi}{6}+n\pi
f(m)=2m+1007 | f(n)=2n+1007
\begin{pmatrix}1&2\\3&4\end{pmatrix} | \left[\begin{array}{cc}1&2\\3&4\end{array}\right]
\begin{pmatrix}-7\\16\\5\end{pmatrix} | (-7,16,5)
(1,2) | \langle1,2\rangle
6+9i | 9i+6
1+2i | i(2-i)
-3i | 3e^{-i\pi/2}
\frac{3\pm i\sqrt3}{2} | \frac{3+i\sqrt3}{2},\frac{3-i\sqrt3}{2}
(r+5)(r+5) | r^2+10r+25
11z^7(11z^7+5) | 121z^{14}+55z^7
\frac{\pi r}{h+r} | \pi r/(r+h)
\frac{v_0}{r_0}(1+r/r_0)^{-3/2} | \frac{v_0}{r_0 (1+r/r_0)^{3/2}}
C_n^3 | \binom{n}{3}
\lceil\log_2 n\rceil | \lceil \log_2(n) \rceil
\text{Evelyn} | Evelyn
\text{(C)} | C
D | (D) Alina
Alina | (D) Alina
\text{no solution} | \emptyset
\infty | infinitely many
5 | five
True | true
\frac{1}{2} | \\frac{1}{2}
\frac12 | 1/2.
3^x | 3<sup>x</sup>
x>2 | x＞2
\sqrt3 | \sqrt{}{3}
4\sqrt2 | 4\sqrt(2)
2^{k-n} | \frac{2^k}{2^n}
2\mathbf{i}+3\mathbf{j} | 2\mathbf{i} + 3\mathbf{j}
x \neq 3 | (-\infty,3)\cup(3,\infty)
\mathbb{R} | (-\infty,\infty)
\mathbb{R} \setminus \{2\} | (-\infty,2)\cup(2,\infty)
[0,\infty) | x\ge 0
y \geq 0 | [0, \infty)
(0,1) | 0<x<1
\frac{x^2}{2}+C | \frac12x^2+C
-\cos x + C | C-\cos x
x=2,y=3 | (2,3)
(x,y)=(2,3) | x=2, y=3
x=2, y=3 | y=3, x=2
3+4i | 4i+3
\frac{\sqrt{2}}{2} | \frac{1}{\sqrt2}
\ln 8 | 3\ln 2
\log_2 8 | 3
e^2 | \exp(2)
\sin 30^\circ | 1/2
\frac{3\pi}{4} | 135^\circ
2, -2 | \pm 2
x = \pm 2 | 2, -2
\text{Yes} | Yes.
No | \text{no}
12 | \text{The answer is }12
12 | 12 \text{ square units}
25 | x = 25 \text{ dollars}
3 | \text{three}
1:2:3 | 2:4:6
y = 2x+1 | 2x+1
0.\overline{3} | 1/3
\sqrt{17} | 4.123105625617661
\angle A = 60^\circ | 60
\frac{1}{x+1} | (x+1)^{-1}
5\text{ m/s} | 5 meters per second
7 | \mathbf{7}
\dfrac{2}{3} | {2/3}
100 | \$100
3.50 | \$3.50
(2,\infty) | \{x : x > 2\}
(2,\infty) | \{x \in \mathbb{R} \mid x > 2\}
A \cup B | A \cup B
x^{2/3} | \sqrt[3]{x^2}
n=7 | 7
a=2b | a = 2b
2n+1 | 1+2n
\frac{a+b}{c} | \frac{a}{c}+\frac{b}{c}
(a,b,c)=(1,2,3) | (1,2,3)
x_1 = 1, x_2 = 2 | 1, 2
x=1 \text{ or } x=2 | x \in \{1,2\}
\{1,2\} | x=1, x=2
\left(\frac{1}{2},\frac{3}{4}\right) | (0.5, 0.75)
18 | 18 \text{ cm}
\text{7 and 9} | 7, 9
10 \text{ and } 12 | 10, 12
6, 8 | 6 and 8
1 \le x \le 3 | [1,3]
x \le -1 \text{ or } x \ge 1 | (-\infty,-1]\cup[1,\infty)
|x|\ge 1 | |x| \geq 1
x^2+y^2=4 | x^2+y^2-4=0
p=2, q=3 | p = 2 \text{ and } q = 3
1/3 | 0.3333
\frac{\pi}{2}+2k\pi | 2k\pi + \frac{\pi}{2}, k \in \mathbb{Z}
\frac{\pi}{2}+2k\pi | \frac{\pi}{2}+2\pi n \text{ for integer } n
2k\pi + \frac{\pi}{3} (k\in Z) | 2k\pi+\frac{\pi}{3}
120 | 5!
\frac{7}{9} | 0.7778
45^{\circ} | \frac{\pi}{4}
2 + 2\sqrt{3} | 2(1+\sqrt{3})
\text{Thursday} | Thursday
\text{east} | East
9.8 \times 10^{2} | 980
0.5 | 1/2
\frac{1}{2}, \frac{1}{3} | \frac{1}{3}, \frac{1}{2}
[kπ-\frac{5π}{12},kπ+\frac{π}{12}],k∈Z | [k\pi-\frac{5\pi}{12}, k\pi+\frac{\pi}{12}]
x=2 或 x=3 | 2,3
f^{-1}(x)=2x | 2x
f^{-1}(x)=\frac{x+1}{2} | f^{-1}(x)=\frac12 x+\frac12
y=\pm x | y = x, y=-x
-\frac{1}{2} | \frac{-1}{2}
-\frac{1}{2} | \frac{1}{-2}
1-\sqrt{2} | -(\sqrt2-1)
2^{10} | 1024
\sqrt{50} | 5\sqrt{2}
(x+1)(x-1) | x^2-1
\cos 2x | 1-2\sin^2 x
\sin^2 x | (\sin x)^2
\arctan 2 | \tan^{-1} 2
\frac{\log 3}{\log 2} | \log_2 3
\text{A, B, D} | A, B, D
ABD | A,B,D
AB | A, B
\lvert x\rvert\ge 1 | \left|x\right| \geq 1
2, -1 | maximum value is $2$, minimum value is $-1$
34 | The largest value is 34
(1,2),(2,1) | a=1, b=2 or a=2, b=1
(a,b)=(1,2),(2,1) | a=1,b=2 \text{ or } a=2,b=1
y=\frac{1}{x} | y=\frac1x (x \neq 0)
y=\frac{1}{x}, x>0 | y = \frac{1}{x}
S=2x^2-3x (0<x<5) | 2x^2-3x
x=-\frac{\pi}{3}+k\pi | \frac{2\pi}{3}+n\pi
(2,3) | P(2,3)
A(1,2), B(3,4) | (1,2),(3,4)
A \cap B = \{1,2\} | \{1,2\}
Yes | \text{Yes, it is possible.}
No | No, such a number does not exist.
\frac{1}{2} | rac{1}{2}
60^\circ | 60^extcirc
9, 10 | 9 chickens and 10 rabbits
x \in (-\infty,1)\cup(1,\infty) | x \ne 1
a>1 \text{ and } a \ne 2 | (1,2)\cup(2,\infty)
P(X \ge 1) = \frac{3}{4} | 0.75
\vec{a} = (1,2) | (1,2)
\overrightarrow{AB} = (3,4) | (3,4)
\{x|x>1或x<-1\} | (-\infty,-1)\cup(1,+\infty)
C_5^2 | 10
A_5^2 | A_5^2
3\text{ or }5 | 3, 5
n \ge 3 | n \geq 3, n \in \mathbb{N}
(x-1)^2+(y-2)^2=4 | x^2+y^2-2x-4y+1=0
x + 2y - 3 = 0 | y = \frac{3-x}{2}
\frac{x^2}{4}+y^2=1 | x^2+4y^2=4
\sin^2\theta | 1-\cos^2\theta
\frac{1}{n(n+1)} | \frac1n-\frac1{n+1}
a_n = 2n-1 | 2n-1
a_n=2^{n-1} | a_n = \frac{2^n}{2}
f(x) = x^2 + c | x^2 + C
1 < x < 2 | 1<x<2
\text{Monday} | monday
42 \text{ square meters} | 42 m^2
\frac{3}{4} \text{ hours} | 45 \text{ minutes}
1.5 \text{ hours} | 1 \frac{1}{2} hours
30 \text{ mph} | 30
2\sqrt{3} \text{ cm} | 2\sqrt3
\text{12 inches} | 1 foot
7:30 | 7:30
0.1\% | 0.001
1.2 \times 10^{5} | 120000
\sqrt[3]{2} | 2^{1/3}
\sqrt[4]{x^2} | \sqrt[4]{x^2}
|a-b| | |b-a|
\log_{2}(x+1) | \frac{\ln(x+1)}{\ln 2}
e^{\ln 5} | 5
(1+\sqrt5)/2 | \frac{1+\sqrt5}{2}
\dfrac{9\sqrt{3}}{4} - \dfrac{\pi}{2} | \frac{9\sqrt3-2\pi}{4}
\text{A and C} | A, C
\text{all real numbers} | (-\infty,\infty)
\mathbb{R} | \text{all real numbers}
(-\infty, \infty) | \mathbb{R}
2^{\aleph_0} | 2^{\aleph_0}
x = 3, y = -1, z = 2 | (3,-1,2)
-1 \pm i | -1+i, -1-i
10! | 3628800
\frac{5!}{2!} | 60
3\frac{1}{2} \text{ cups} | 3.5
12\pi \text{ cubic inches} | 12\pi
18\sqrt{2} | 25.456
5.67 | \frac{17}{3}
85.71 | \frac{600}{7}
600/7 | 85.71
0.6054 | \cos^{10}(\pi/10)
\frac{600}{7}\% | 85.71\%
2.5 \text{ million} | 2500000
3 dozen | 36
x=\frac13\approx0.333 | \frac13
\sqrt{50} \approx 7.07 | 5\sqrt2
12 | 12.000000000000002
\sqrt{2}+\sqrt{3}-\sqrt{5+2\sqrt6} | 0
10^{30}(\sqrt{2}+\sqrt{3}-\sqrt{5+2\sqrt6}) | 0
(\sin 1)^{900} | (\sin 1)^{400} (\sin 1)^{500}
\sqrt{8}\cdot10^{-60} | 2\sqrt2\cdot10^{-60}
D | \text{(D) } 5
5 | \text{(D) } 5
D | \textbf{(D)}
D | D. 12
12 | D. 12
D | \mathrm{D}
D | (D)\ 12
12 | \textbf{(D)}\ 12
D | \text{D}
D | \text{Option D}
12500 | 12{,}500
12500 | 12\,500
3,4 | 3\text{ and }4
3/4 | \frac{3}{4}\text{ cups}
15/2 | 7\dfrac{1}{2}
\emptyset | \varnothing
8/15 | 0.5\overline{3}
-1,2 | \left\{ -1, 2 \right\}
x \le 2 | \left(-\infty, 2\right]
[2,\infty) | [2, +\infty[
12 | \mathbf{12}
(1,2) | \mathbf{(1,2)}
1/2 | \displaystyle \frac12
12 | \underline{12}
12 | 12\mathrm{~cm}
12 | 12~\text{cm}
12 | 12\;\mathrm{cm^2}
12 | 12\ \mathrm{m/s}
3.14 | \approx 3.14
12 | \text{12}
12 | "12"
12 | `12`
12 | **12**
12 | 12.
12 | 12.0
12 | = 12
12 | : 12
12 | \Rightarrow 12
1/2 | \nicefrac{1}{2}
1/2 | \sfrac{1}{2}
\sqrt{3} | \sqrt 3
2\sqrt{3} | 2\,\sqrt{3}
2\sqrt{3} | 2·√3
2\sqrt{3} | 2*sqrt(3)
2\sqrt{3} | 2 sqrt 3
x^2+1 | x**2 + 1
x^2+1 | x² + 1
e^{2x} | exp(2*x)
\pi/4 | pi/4
\frac{\pi}{4} | 0.25\pi
\frac{3\pi}{2} | \frac{3}{2}\pi
\log_2 3 | \log_{2}3
\ln 2 | \log_e 2
\sin x | sin(x)
\frac{1}{2}\ln 3 | \ln\sqrt{3}
(x-1)(x+2) | (x+2)(x-1)
3x^2y | 3yx^2
2^{10} | 2^10
x_1 = 2 | 2
\begin{bmatrix}1\\2\end{bmatrix} | \begin{pmatrix} 1 \\[2pt] 2 \end{pmatrix}
\begin{pmatrix}1&2\end{pmatrix} | [1, 2]
[1,2,3] | (1,2,3)
5 | \lvert -5 \rvert
5 | |{-5}|
120^\circ | 120 \text{ degrees}
120^\circ | 120\degree
12:30 | 12:30 \text{ PM}
50\% | \frac{1}{2}
1{,}234.5 | 1234.5
\$1,234.50 | 1234.5
10^6 | 1{,}000{,}000
6.02 \times 10^{23} | 6.02e23
\frac{a}{b} | a/b
a^{-1} | \frac{1}{a}
\begin{cases} x & x>0 \\ -x & x<0 \end{cases} | \begin{cases} x, & x>0 \\ -x, & x<0 \end{cases}
\{(1,2),(3,4)\} | (3,4), (1,2)
(1,2) \text{ and } (3,4) | (1,2), (3,4)
x = 1 \text{ or } x = -1 | x = \pm 1
\pm 1 | 1, -1
2, 3, \text{ and } 5 | 2, 3, 5
x < -1 \text{ or } x > 1 | (-\infty, -1) \cup (1, \infty)
-1 < x < 1 | (-1, 1)
|x| < 1 | |x|<1
-\frac{3}{4} | \frac{-3}{4}
-\frac34 | - \frac{3}{4}
0 | 0.0
No | \text{No}
\text{True} | True
\text{Friday} | Friday
\text{Friday} | \textbf{Friday}
\text{neither} | neither
2x - 3y = 6 | 3y = 2x - 6
y = \frac{2}{3}x - 2 | 2x-3y=6
n^2 + n | n(n+1)
\frac{n(n+1)}{2} | \binom{n+1}{2}
n! | n \cdot (n-1)!
2^{n+1} - 2 | 2(2^n-1)
\cos 36^\circ | \frac{1+\sqrt5}{4}
\tan 15^\circ | 2-\sqrt3
\arctan 1 | \pi/4
i | e^{i\pi/2}
\frac{1}{1-i} | \frac{1+i}{2}
-8 + 8i\sqrt3 | 16 e^{2\pi i/3}
16 \operatorname{cis} 120^\circ | -8+8i\sqrt{3}
\mathbf{i} + 2\mathbf{j} | \mathbf i + 2 \mathbf j
\frac{dy}{dx} = 2x | 2x
F(x) = x^2 + C | x^2 + C
\text{Evelyn} | The answer is Evelyn.
3 \text{ or } 4 | 3,4
3\sqrt{2} \text{ units} | 3\sqrt2
AB = 5 | 5
m\angle A = 30^\circ | 30
\angle ABC = 45^\circ | 45^\circ
\triangle ABC = 6 | 6
[ABC] = 6 | 6
S = 6 | 6
\text{Area} = 6 | 6
v_0 = 3 \text{ m/s} | 3
"""

UNEQUAL = r"""
2 | (0,1)
(1,2) | \{1,2\}
\{1,2\} | (1,2)
1,1,2 | 1,2,2
[0,1) | (0,1)
5 \text{ cm} | 5 \text{ m}
12:00 | 1:00
7=11a+c | 11a+c
\pm 2021 | 2021
\text{oddd} | odd
x=5 | y=5
1/3 | 0.33
\pi | 3.14
\sqrt2 | 1.41
(1,2) | (2,1)
\begin{pmatrix}1&2\end{pmatrix} | \begin{pmatrix}1\\2\end{pmatrix}
0.5 | 50
5 | \{4,5\}
x<5 | x\le5
x<5 | x>5
x>5 | x<5
204_5 | 204
204_5 | 204_6
42 | 1,2,3,42
42 | 42 or 43
\frac{1}{2} | \frac{1}{3}
x^2 | x^3
f(x)=2x | f(x)=3x
k\pi | 2k\pi
A | B
\text{Yes} | \text{No}
2i | 2
3 | 3i
\sin x | \cos x
5! | 5
\text{(C)} | \text{(B)}
10 | 10^{10}
1+\frac1e | 1-\frac1e
2x | 2y
x=1,y=2 | x=2,y=1
90^\circ | 90\pi
0 | \frac{0}{0}
\infty | -\infty
\infty | 10^{100}
(0,1) | [0,1]
(-\infty, 5) | 5
[1,3] | \{1,3\}
2,3 | 2,3,3
1/2004! | 1/2006!
1:2 | 2:1
y=x | y=-x
x+y=1 | x-y=1
x^2+y^2=1 | x^2+y^2=2
0 | x
-5 | 5
5 | -5
0.001 | 0.002
100 | 1,00
12 | 1, 2
12 | 1 2
y=\frac1x, x>0 | y=\frac1x, x<0
x=-\frac{\pi}{3}+k\pi | \frac{\pi}{3}+k\pi
x=\frac{\pi}{6}+k\pi | \frac{\pi}{6}+2k\pi
P(2,3) | (3,2)
A(1,2), B(3,4) | A(3,4), B(1,2)
a=1, b=2 or a=2, b=1 | a=1, b=1 or a=2, b=2
42 \text{ square meters} | 42 \text{ cubic meters}
42 m^2 | 42 \text{ square feet}
\frac{3}{4} \text{ hours} | 75 \text{ minutes}
\mathbb{R} | (0,\infty)
(x-1)^2+(y-2)^2=4 | (x-1)^2+(y-2)^2=2
Yes | No, it is not.
\overrightarrow{AB} = (3,4) | (4,3)
2^{\aleph_0} | \aleph_0
25^\circ | 25 \text{ km}
maximum value is 2, minimum value is -1 | 2, 1
\sqrt{17} | 4.12
e^{-100} | e^{-101}
2+3^{2012} | 3+3^{2012}
\ln x^2 | 2\ln(-x)
f(2) < f(1) < f(4) | f(1) < f(2) < f(4)
b<a<d<c | a,b,d,c
x^2 > 1 | x > 1
2x+y<3 | y>3-2x
6\mathbf{i} | 6\mathbf{j}
1.5\times10^{-3} | 1.5\times10^{3}
[-36,104] | (-36,104]
|z-i|<1 | |z+i|<1
|z-i|=1 | |z+i|=1
6\pi^2 R | -6\pi^2 R
n\pi | (n+1)\pi
0.0011_{2} | -0.0011_{2}
45 \text{ units}^2 | 45 \text{ units}^3
(x-3)(x+3) | (x-3](x+3)
(1,2,3) | (1,2,3]
\gcd(x,n)=1 | \gcd(x^2,n)=1
(3,500) | 3500
e^{-at^2} | e^{at^2}
aE(X^2)+bE(X) | aE(X^2)-bE(X)
f(x) = c | f(x^2) = c
P(0) = 7 | P(3) = 7
a_1 = 0 | a_3 = 0
r(r-5) = 0 | r(r+5) = 0
(-1)^{kl} | 1^{kl}
(-1)^r | 1
AB - BA | 0
-A^{-1}(DA-AD) | A^{-1}(DA-AD)
\|Ax\|_2^2 | \|Ax\|_4^2
\text{Yes} | -\text{Yes}
negative | -negative
\lim_{k\to\infty} a_k = b | \lim_{k\to-\infty} a_k = b
12 | 12.0000000002
12 | 12.000000002
(\sin 1)^{900} | (\sin 1)^{901}
(\sin 1)^{900} | 0
e^{-1000} \sin 1 | e^{-1001} \sin 1
\frac{\sqrt2}{3000!} | \frac{\sqrt2}{3001!}
\sin(10^{-50}) | 0
\sqrt{2}\cdot 10^{-60} | \sqrt{3}\cdot 10^{-60}
0,4 | \frac{2}{5}
\pi I_0(1) | \pi n
h | H
"""

# Wrong whichever side is the gold's: the answer (right) must earn nothing.
TRICKS = r"""
2 | \int_0^2 x\,dx
2 | \int_{0}^{2} x dx
\frac{1}{3} | \int_0^1 x^2 dx
55 | \sum_{k=1}^{10} k
120 | \prod_{k=1}^{5} k
1 | \lim_{x \to 0} \frac{\sin x}{x}
2x | \frac{d}{dx} x^2
x | \frac{d}{dx} x^2
2x | \frac{\partial}{\partial x} x^2
-2 | \det \begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}
-2 | \begin{vmatrix} 1 & 2 \\ 3 & 4 \end{vmatrix}
-2 | \left| \begin{matrix} 1 & 2 \\ 3 & 4 \end{matrix} \right|
6 | \gcd(12, 18)
36 | \operatorname{lcm}(12, 18)
36 | \text{lcm}(12, 18)
1 | 7^{4} \mod 10
1 | 7^4 \bmod 10
1 | 7^4 \pmod{10}
5 | \max(3, 5)
5 | \max\{3, 5\}
3 | \min(3, 5)
2 | \int_0^2 x dx = \int_0^2 x dx
2 | 1 + \int_0^1 1 dx
2 | \frac{\int_0^2 x dx}{1}
5 | 3 = 5
5 | 5 = 3
5 | 3 = 5 = 5
5 | x = 3 = 5
5 | x = 5 = 3
5 | 2 + 2 = 5
4 | 2 + 2 = 5
5 | 4 < 5
5 | 5 > 4
5 | 5 \ge 5
5 | 5m
5 | 5s
5 | 5 m
5 | 5g
5 | 5x
5 | 5k
5 | 5L
5 | 5a
5 \text{ cm} | 5 \text{ m}
5 \text{ cm} | 5 \text{ cm}^2
5 \text{ hours} | 5 \text{ minutes}
5 \text{ kg} | 5 \text{ g}
\$5 | 5 \text{ cents}
60 \text{ mph} | 60 \text{ km}
12_7 | 12_8
12_7 | 12
12 | 12_7
9 | 12_7
1011_2 | 1011
1011_2 | 11
1011 | 1011_2
42 | 42 or 43
42 | 41 or 42
42 | 42 \text{ or } 43
42 | 42, 43
42 | 41, 42
42 | \{42, 43\}
42 | 42 \text{ and } 43
42 | [41, 42]
42 | [0, 100]
42 | (0, 100)
42 | (41, 43)
42 | x \in [0, 100]
42 | 0 \le x \le 100
42 | x \le 42
42 | x \ge 42
42 | x \ne 41
42 | \pm 42
42 | 40 \pm 2
42 | 42 \pm 1
42 | \mathbb{R}
42 | \mathbb{Z}
42 | \{x \mid x > 0\}
42 | 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 42
42 | \{1, 2, \ldots, 100\}
42 | 1, 2, \ldots, 42
42 | x
42 | n
42 | ?
42 | answer
42 | the answer
42 | 42 or maybe 43
42 | either 42 or 43
42 | between 41 and 43, perhaps 42
42 | not 42
42 | it is not 42
42 | 42x
42 | 42 + x
42 | 42 + C
42 | 4 2
42 | 4,2
42 | 4.2
42 | 42!
42 | 42^{\circ} + 1
42 | 42\%\%
42 | -42
42 | 42i
42 | 42 + 0.0001
42 | 42.0001
42 | 41.9999
42 | 41.9999999
42 | 42:1:1
42 | 42:2
42 | (42, 42)
42 | 42, 42
42 | \frac{42}{0}
42 | 42 \cdot \frac{0}{0}
42 | 42^{1^{\infty}}
42 | \infty
42 | 10^{10^{10}}
42 | 9^{9^{9^{9}}}
42 | f(42)
42 | f(x) = 42x
42 | g(x)
42 | y = 42x
42 | x + y = 42
42 | 42 = 42x
42 | a = b = c
42 | \boxed{}
42 | \text{42 or 43}
42 | \text{forty-three}
0 | x - y
0 | 0x = 1
0 | a^2 + b = 0
0 | x = x
0 | 0 = 1
0 | __import__('os').system('true') or 0
0 | exit(0)
0 | print(0)
1 | True or 1
1 | x == 1 or 1
1 | 1 if x else 2
\frac{1}{3} | 0.3
\frac{1}{3} | 0.33
\frac{2}{3} | 0.66
\frac{2}{3} | 0.67
\frac{2}{3} | 0.666
\pi | 3
\pi | 3.1
\pi | 3.14
\pi | \frac{22}{7}
\pi | 3.15
e | 2.7
e | 2.72
\sqrt{2} | 1.4
\sqrt{2} | 1.41
\sqrt{2} | 1.42
10^{-20} | 10^{-21}
10^{-20} | 0
2^{-99} | 2^{-98}
1/2004! | 1/2006!
1/2004! | 0
10^{100} | 10^{100} + 1
100000000001000000000 | 100000000000000000000
12345678902 | 12345678901
2^{2025} | 3^{2025}
2^{10^9} | 2^{10^9} + 1
10^9! | 10^9! + 1
\binom{2026}{1013} | \binom{2026}{1012}
1 - \frac{1}{e} | 1 + \frac{1}{e}
1, 1, 2 | 1, 2, 2
1, 2 | 1, 2, 3
1, 2, 3 | 1, 2
1, 2 | 1
\{1, 2\} | 1
(1, 2) | \{1, 2\}
(1, 2) | (2, 1)
(1, 2), (3, 4) | (1, 2, 3, 4)
(1, 2), (3, 4) | (1, 4), (3, 2)
(1, 2), (3, 4) | (1, 2), (3, 4), (5, 6)
[0, 1) | [0, 1]
(0, 1) | [0, 1]
(0, 1) | [0, 1)
(-\infty, 1) | (-\infty, 2)
(0, 1) \cup (2, 3) | (0, 3)
(0, 1) \cup (2, 3) | (0, 1)
x < 1 | x \le 1
x < 1 | x > 1
x < 1 | y > 1
x > 5 | 5
x \ne 3 | 3
x = 1, y = 2 | x = 2, y = 1
x = 5 | y = 5
y = x | y = -x
y = 2x + 1 | y = 2x
2x + 4y - 3 = 0 | 2x + 4y + 3 = 0
3x - y + 13 = 0 | 3x + 4y + 14 = 0
x^2 + y^2 = 1 | 0 = 0
x^2 + y^2 = 1 | 1 = 1
f(x) = 2x | f(x) = 2y
f(x) = 2x | f(2x)
2x | 2y
x^2 | x
|x| | x
\sqrt{x^2} | x
\ln x^2 | 2 \ln(-x)
\frac{x^2}{x^2} | 0
n! | (n+1)!
2^n | n^2
k\pi | 2k\pi
k\pi | \pi
\frac{\pi}{6} + k\pi | \frac{\pi}{6} + 2k\pi
30^\circ | 30\pi
30^\circ | \frac{\pi}{3}
\frac{\pi}{6} | 60^\circ
0.5 | 50
50\% | 5
50\% | 0.05
1:2 | 2:1
2:3 | 3:4
12:00 | 1:00
8:34 \text{ p.m.} | 8:34
\begin{pmatrix} 1 & 2 \end{pmatrix} | \begin{pmatrix} 1 \\ 2 \end{pmatrix}
\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} | \begin{pmatrix} 1 & 3 \\ 2 & 4 \end{pmatrix}
\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} | (1, 2, 3, 4)
1 + 2i | 1 - 2i
2i | 2
i | 1
A | B
A | A, B
A | ABCD
\text{(C)} | \text{(A) (B) (C) (D)}
C | A or C
\text{Yes} | \text{No}
\text{Yes} | \text{Yes and no}
\text{Yes} | \text{Not yes}
\text{odd} | \text{even}
\text{odd} | \text{odd or even}
\text{odd} | \text{not odd}
\text{odd} | \text{oddd}
\text{Petya will receive the last token.} | token
\text{Petya will receive the last token.} | the
\text{Petya will receive the last token.} | Vasya
\text{Petya will receive the last token.} | last
\text{Petya will not receive the last token.} | Petya
\text{The function is not odd.} | odd
\text{The function is odd.} | function
\text{Evelyn} | E
\text{Evelyn} | Evelyn or Briana
\emptyset | 0
\emptyset | \{0\}
\text{no solution} | 0
\infty | -\infty
\infty | 10^{100}
\frac{1}{x} | x y = 1
\frac{1}{x} | xy - 1 = 0
\sqrt{3} \csc \theta | \rho \sin \theta = \sqrt{3}
42 | x + 0 = 42
42 | 2x = 84
42 | x - 42 = 0
42 | 42 if n is even, else 43
42 | 42 \text{ if } n > 0 \text{ otherwise } 43
42 | 42, 43, 44
42 | {
42 | :
42 | .
42 | The answer is correct
42 | Solution
42 | [42, 43)
42 | 42/1/0
42 | 42 - 0.5
42 | 4\ 2
42 | 42 43
42 | 42\quad 43
42 | 42\\43
42 | \begin{cases} 42 \\ 43 \end{cases}
42 | 42 \to 43
42 | 42 \Rightarrow 43
42 | 43 \Rightarrow 42
42 | 42 \land 43
42 | 42 \vee 43
42 | 42 \cup 43
42 | 42 : 43
42 | 42 \mid 43
42 | 42 ; 43
42 | 42 \& 43
42 | 42 & 43
42 | 42 / 43
42 | 42 ~ 43
42 | 42 \sim 43
42 | 42 \approx 43
42 | 42 \equiv 43
42 | 42 \ne 43
42 | 42 \text{ and not } 43
42 | 42? No, 43
42 | 42 (or 43)
42 | 42 \text{ (or } 43)
42 | 42 \text{ or possibly 43}
42 | 42 +/- 1
42 | 42 \pm \epsilon
42 | 42 + \epsilon
42 | 42_{43}
42 | 42^{43}
42 | \overline{42}
42 | 42'
42 | {42}_{10} + 1
42 | \frac{42}{43}
42 | \sqrt{42}
42 | \sqrt{42^2+1}
42 | \lfloor 42.5 \rfloor + 0.5
42 | \text{forty two or forty three}
42 | 0x2A
42 | 42e1
42 | 042.5
42 | 1 < 42 < 43
42 | 41 < x < 43
42 | x = 42 \text{ or } 43
42 | x = 42, 43
42 | x = 42 or y = 43
42 | x \in \{42, 43\}
42 | n = 1, 2, ..., 100
42 | 42\,\%\,\%
42 | 42 \text{ thousand}
42 | 42 million
42 | 42 \text{ hundred}
42 | 42k
42 | 42 \cdot 10^3
5 | 5 \text{ dozen}
\frac{1}{2} | \frac{1}{2}x
\frac{1}{2} | .5.5
x^2 | x^{2.0001}
x+1 | x+1.0000001
\sqrt{2} | 1.414213
\{1,2,3\} | \{1,2,3,...\}
1,2,3 | 1,2,3,\ldots
(1,2) | 1,2,1,2
Yes | Yes/No
Yes | Y
A | A/B
A | AB
B | ABCD
C | (A), (B), (C), (D)
\text{Evelyn} | \text{Evelyn, Carla}
\text{Evelyn} | everyone
x=1 | x=1,2
y=x+1 | y=x+1, y=x+2
[1,2] | [1,2] \cup [3,4]
[1,2] | [1,2], [3,4]
(1,2) | (1,2) or (2,1)
x>1 | x>1 or x<0
x>1 | x \ge 1 - \epsilon
D | (D) 5 or (E) 6
A | (A) 5 (B) 6
A | A. 5 B. 6
5 | (D) 6
D | (E) 5
A | (A)(B)(C)
D | D. or E.
5 | (D) 5 or 6
"""


def pairs(table: str) -> list[tuple[str, str]]:
    """(gold, answer) of each line."""
    rows = []
    for line in table.strip().splitlines():
        gold, answer = line.split(" | ", 1)
        rows.append((gold, answer))
    return rows
