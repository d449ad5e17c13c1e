"""Pairs of answers by kind: gold, answer, outcome."""

FORMS = r"""
4:30 | 2:15 | wrong
4:30 | 4:30 PM | right
4:30 PM | 16:30 | right
4:30 PM | 4:30 AM | wrong
04:30 | 4:30 | right
\text{4:30 p.m.} | 4:30\text{ PM} | right
12:00 | 12:00\text{ PM} | right
12:00 PM | 12:00 AM | wrong
12:00 AM | 00:00 | right
1:2:3 | 1 : 2 : 3 | right
1:2:3 | 1:3:2 | wrong
2:3 | \frac{2}{3} | right
2:3 | 2 to 3 | right
2:3 | 3:2 | wrong
2 | 4:2 | wrong
2 | 3 1/2 | wrong
3 1/2 | \frac{7}{2} | right
3.5 | 3\frac12 | right
-3.5 | -3\ \dfrac{1}{2} | right
1,234\frac{1}{2} | 1234.5 | right
12 | 1 2 | wrong
3 | 1 2 | wrong
1 2 | 12 | wrong
1 2 | 1 2 | right
12345 | 12 345 | right
cat | act | wrong
cat | Cat | right
\text{cat} | act | wrong
cat | \text{cat} | right
red, blue | blue, red | right
red, blue | der, blue | wrong
xyz | zyx | right
1101_2 | 1101_{2} | right
1101_2 | (1101)_2 | right
1101_2 | 1101_{\text{two}} | right
1101_2 | 1101 \text{ (base 2)} | right
1101_2 | 1101 | right
1101_2 | 1101_3 | wrong
1101_2 | 13 | wrong
13 | 1101_2 | wrong
1F_{16} | 1f_{16} | right
12_{10} | 12 | right
12:00 PM | noon | right
noon | 12:00 | right
12 noon | 12 PM | right
12:00 AM | noon | wrong
midnight | 00:00 | right
3:00 PM | 3 p.m. | right
3 PM | 15:00 | right
3 PM | 3 AM | wrong
3 | 3 PM | right
15 | 3 PM | wrong
3 | 3:00 | wrong
a:b | a:b | right
a:b | b:a | wrong
a:b | b | wrong
A:B | B:A | wrong
\frac{7}{3} | 2 and 1/3 | right
-\frac{7}{3} | -2\text{ and }\frac{1}{3} | right
\frac{7}{3} | 2 and 1/4 | wrong
2 | 2 and 1/3 | wrong
2,\frac{1}{3} | 2 and 1/3 | right
a to b | a:b | right
a to b | b to a | wrong
p to q to r | p to r to q | wrong
\sqrt{2}:1 | \sqrt2 : 1 | right
1:\sqrt{3}:2 | 1:2:\sqrt{3} | wrong
\pi:4 | \frac{\pi}{4} | right
49_m | 49_{m} | right
49_m | 49_n | wrong
49 | 49_m | wrong
49_b | 49_{b+1} | wrong
-101_2 | -101_3 | wrong
1.01_2 | 1.01_3 | wrong
"""
TEXTS = r"""
red and blue | blue and red | right
red and blue | red, blue | right
red, green and blue | blue, red, and green | right
red and blue | red | wrong
A and B | B and A | right
blue | the blue | right
2020-03-04 | 2020-3-4 | right
2020-03-04 | 2020-04-03 | wrong
2020-03-04 | 2013 | wrong
3/4/2020 | 6/8/2020 | wrong
3/4/2020 | \frac{3}{8080} | wrong
10-12 | -2 | wrong
555-1234 | -679 | wrong
H_2O | H2O | right
H2O | HO2 | wrong
x | X | wrong
2x+1 | 2X+1 | wrong
\Omega | \omega | wrong
5\% increase | 5\% decrease | wrong
5\% increase | 5\% | right
3 km north | 3 km south | wrong
\{1,2\} | (1,2) | wrong
(1,3) | \{1,3\} | wrong
\{(1,2)\} | (1,2) | right
\{\emptyset\} | \emptyset | wrong
\emptyset | \{\} | right
\emptyset | \varnothing | right
(1,3) | (3,1) | wrong
(-\infty,2) | (2,-\infty) | wrong
x=1, y=2 | 1, 2 | right
x=1, y=2 | y=2, x=1 | right
x=1, y=2 | 2, 1 | wrong
x=1,y=2 | (2,1) | wrong
(1,2) | x=1, y=2 | right
(1,2) | x=2, y=1 | wrong
p and q | p or q | wrong
3\%-5\% | -2\% | wrong
12_5+13_5 | 12_6+13_6 | wrong
T9_{12} | T9_{13} | wrong
1, 1, 2 | 1, 2, 2 | wrong
1, 1, 2 | 2, 1, 1 | right
7:45 on Monday | 7:45 on Friday | wrong
5 May, 3 June | 5 May, 3 July | wrong
f'(x) | f(x) | wrong
f'(x) | f''(x) | wrong
"""
VALUES = r"""
\frac{1}{2004!} | \frac{1}{2006!} | wrong
\frac{1}{2004!} | \frac{2005}{2005!} | right
\frac{1}{2^{99}} | \frac{1}{2^{98}} | wrong
\frac{1}{2^{99}} | 2^{-99} | right
\frac{2^{2005}+1}{3 \cdot 2^{2006}} | \frac{1}{3 \cdot 2^{2006}} | wrong
\frac{2^{2005}+1}{3 \cdot 2^{2006}} | \frac{1}{6}+\frac{1}{3 \cdot 2^{2006}} | right
4.6e-24 | 2e-20 | wrong
4.6e-24 | 4.6 \times 10^{-24} | right
4.6e-24 | 46e-25 | right
1.6e-19 | -1.6e-19 | wrong
.25 | .2500004 | wrong
.25 | 0.250 | right
.25 | 1/4 | right
1/3 | .333333333 | wrong
10^{400} | 10^{400}+1 | wrong
10^{400}+1 | 1+10^{400} | right
\frac{x}{2^{99}} | \frac{x}{2^{98}} | wrong
\frac{x}{2^{99}} | 2^{-99}x | right
x+2^{-99} | x+2^{-98} | wrong
\frac{\sqrt{2}}{2^{99}} | \frac{\sqrt{2}}{2^{98}} | wrong
\frac{\sqrt{2}}{2^{99}} | \frac{1}{2^{98}\sqrt{2}} | right
e^{-100} | e^{-101} | wrong
(1, 2^{-99}) | (1, 2^{-98}) | wrong
\{1, 2^{-99}\} | \{1, 2^{-98}\} | wrong
[0, 2^{-99}) | [0, 2^{-98}) | wrong
x=2^{-99} | x=2^{-98} | wrong
\begin{pmatrix} 2^{-99} \\ 1 \end{pmatrix} | \begin{pmatrix} 2^{-98} \\ 1 \end{pmatrix} | wrong
\sqrt{10^{60}+1} | 10^{30} | wrong
x<2^{-99} | x<2^{-98} | wrong
x<2^{-99} | 2^{-99}>x | right
x<2^{-99} | x \le 2^{-99} | wrong
0<x<2^{-99} | 0<x<2^{-98} | wrong
0<x<2^{-99} | 2^{-99}>x>0 | right
0.64N | \frac{16}{25}N | right
"""
WORKED = r"""
6 | 1+5 | unevaluated
72 | 48/2+48 | unevaluated
2 | \sqrt{4} | unevaluated
2 | \frac{4}{2} | unevaluated
120 | 5! | unevaluated
6 | \binom{4}{2} | unevaluated
6 | 2 \cdot 3 | unevaluated
6 | 2 \times 3 | unevaluated
6 | 6=1+5 | unevaluated
6 | -(-6) | unevaluated
1 | x^0 | unevaluated
0 | x-x | unevaluated
9 | 9x/x | unevaluated
50\% | 100\%-50\% | unevaluated
-2 | \begin{vmatrix} 1 & 2 \\ 3 & 4 \end{vmatrix} | unevaluated
8 | 2^3 | unevaluated
\frac{1}{2} | \frac{1}{4}+\frac{1}{4} | unevaluated
\{1,2\} | \{1, 1+1\} | unevaluated
6 | 1+5=6 | right
6 | 6.0 | right
6 | x=6 | right
6 | 6 \text{ cm}^2 | right
-6 | -6 | right
1000 | 1e3 | right
3000000 | 3 \times 10^6 | right
0.75 | \frac{3}{4} | right
\frac{3}{4} | 0.75 | right
1+5 | 5+1 | right
6 | 7 | wrong
6 | 1+6 | wrong
"""
LENIENT = r"""
35 | 35.0\% | right
12.5 | 12.5\% | right
12.5\% | 0.125 | right
12.5\% | \frac{1}{8} | right
12.5\% | 12\frac{1}{2}\% | right
12.5\% | 1.25 | wrong
12.5\% | 1.25\% | wrong
\frac{3+\sqrt5}{2}, \frac{3-\sqrt5}{2} | \frac{3\pm\sqrt5}{2} | right
\frac{3\pm\sqrt5}{2} | \frac{3-\sqrt5}{2}, \frac{3+\sqrt5}{2} | right
\frac{3\pm\sqrt5}{2} | \frac{3+\sqrt5}{2} | wrong
3 \pm 2 \sqrt{2} | x = 3 \pm \sqrt{8} | right
3 \pm 2 \sqrt{2} | 3 \pm \sqrt{7} | wrong
1, -1, 2, -2 | \pm 1, \pm 2 | right
(-\infty,2)\cup(3,\infty) | x<2\text{ or }x>3 | right
(-\infty,2)\cup(3,\infty) | x<2 or x>3 | right
(-\infty,2)\cup(3,\infty) | x<2 \lor x>4 | wrong
x<2\text{ or }x>3 | (-\infty,2)\cup(3,\infty) | right
(2,3) | x>2\text{ and }x<3 | right
\frac{1}{3} | 0.\overline{3} | right
\frac{1}{3} | 0.(3) | right
\frac{1}{3} | 0.333... | right
\frac{1}{3} | 0.\dot{3} | right
1 | 0.\overline{9} | right
\frac{1}{3} | 0.\overline{4} | wrong
30 | 30° | right
30^\circ | 30 | right
30 | 30^{\circ} | right
\sqrt{5} | √5 | right
2\sqrt{15} | 2√(15) | right
x^2+1 | x²+1 | right
12 | １２ | right
1,2 | １，２ | right
3.5 | ３．５ | right
3.5 | 3½ | right
-5 | −5 | right
2\pi | 2π | right
x \le 2 | x ≤ 2 | right
5 | €5 | right
5 | £5.00 | right
5 | 5 USD | right
\$5 | US\$5 | right
1234 | ¥1,234 | right
0,111 | 0.111 | right
5 | 5\,\text{cm} | right
6 | 6 m/s | right
6 m/s | 6 | right
60 | 60km/h | right
9.8 | 9.8 m/s^2 | right
6 | 6 \frac{m}{s} | right
5 | \$5/hour | right
\frac{6m}{s} | 6 m/s | right
6 | 7 m/s | wrong
6 | 6 x/y | wrong
6 | 6/s | wrong
6 | 6 m/s + 1 | wrong
5000000 | 5 million | right
2.5\text{ million dollars} | \$2,500,000 | right
5 million | 5 | wrong
25\% | 25 basis points | wrong
25\% | \approx 25\% | right
3.5 | 3.5 L | right
\infty | infinity | right
(1+i)^2 | 2i | right
2e^{i\pi/3} | 1+\sqrt{3}i | right
2e^{i\pi/3} | 1-\sqrt{3}i | wrong
\frac{1}{1+i} | \frac{1-i}{2} | right
e^{i\theta} | \cos\theta+i\sin\theta | right
e^{i\theta} | e^{-i\theta} | wrong
\sqrt{-4} | 2i | right
1 \pm 2i | 1+2i, 1-2i | right
2\sin 60^\circ | \sqrt{3} | right
a<b<c | c>b>a | right
a<b<c | a<c<b | wrong
"""
