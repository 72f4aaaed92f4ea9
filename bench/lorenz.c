/* The ensemble of Lorenz systems in plain C: Tsit5, float, one problem after another on one core.
   Same tolerance, norm and controller as the library's; the time is taken here. */
#include <math.h>
#include <time.h>

static const float A[6][6] = {
    {0.161f},
    {-0.00848065549f, 0.335480655f},
    {2.89715306f, -6.35944849f, 4.36229543f},
    {5.32586483f, -11.7488836f, 7.49553934f, -0.0924950664f},
    {5.86145544f, -12.9209693f, 8.1593679f, -0.0715849733f, -0.0282690504f},
    {0.0964607668f, 0.01f, 0.47988965f, 1.37900857f, -3.29006952f, 2.32471052f}};
static const float E[7] = {0.00178001105f, 0.00081643446f, -0.00788087801f, 0.144711007f, -0.582357165f, 0.458082106f, -0.0151515152f};

static void lorenz(const float *y, float rho, float *k) {
    k[0] = 10.0f * (y[1] - y[0]);
    k[1] = y[0] * (rho - y[2]) - y[1];
    k[2] = y[0] * y[1] - (8.0f / 3.0f) * y[2];
}

double solve(int n, const float *rho, float end, float tol, float *out) {
    struct timespec begun, done;
    clock_gettime(CLOCK_MONOTONIC, &begun);
    for (int problem = 0; problem < n; problem++) {
        float y[3] = {1, 1, 1}, y1[3], k[7][3], t = 0, h = 1e-3f;
        lorenz(y, rho[problem], k[0]);
        while (t < end) {
            if (t + h > end) h = end - t;
            for (int i = 0; i < 6; i++) {
                for (int c = 0; c < 3; c++) {
                    float sum = 0;
                    for (int j = 0; j <= i; j++) sum += A[i][j] * k[j][c];
                    y1[c] = y[c] + h * sum;
                }
                lorenz(y1, rho[problem], k[i + 1]);
            }
            float total = 0;
            for (int c = 0; c < 3; c++) {
                float error = 0;
                for (int j = 0; j < 7; j++) error += E[j] * k[j][c];
                error *= h / (tol + tol * fmaxf(fabsf(y[c]), fabsf(y1[c])));
                total += error * error;
            }
            float ratio = sqrtf(total / 3);
            if (ratio <= 1) {
                t += h;
                for (int c = 0; c < 3; c++) {
                    y[c] = y1[c];
                    k[0][c] = k[6][c];
                }
            }
            h *= fminf(10.0f, fmaxf(0.2f, 0.9f * powf(fmaxf(ratio, 1e-10f), -0.2f)));
        }
        for (int c = 0; c < 3; c++) out[3 * problem + c] = y[c];
    }
    clock_gettime(CLOCK_MONOTONIC, &done);
    return (done.tv_sec - begun.tv_sec) + 1e-9 * (done.tv_nsec - begun.tv_nsec);
}
