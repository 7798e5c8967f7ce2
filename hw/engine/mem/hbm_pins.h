// KV_EACH_CHANNEL(X) expands X(0) ... X(KV_CHANNELS - 1), for pins that Verilator names by number.
#pragma once

#ifndef KV_CHANNELS
#error "define KV_CHANNELS: the number of memory channels of the design, 1 to 32"
#endif

#define KV_EACH_1(X) X(0)
#define KV_EACH_2(X) KV_EACH_1(X) X(1)
#define KV_EACH_3(X) KV_EACH_2(X) X(2)
#define KV_EACH_4(X) KV_EACH_3(X) X(3)
#define KV_EACH_5(X) KV_EACH_4(X) X(4)
#define KV_EACH_6(X) KV_EACH_5(X) X(5)
#define KV_EACH_7(X) KV_EACH_6(X) X(6)
#define KV_EACH_8(X) KV_EACH_7(X) X(7)
#define KV_EACH_9(X) KV_EACH_8(X) X(8)
#define KV_EACH_10(X) KV_EACH_9(X) X(9)
#define KV_EACH_11(X) KV_EACH_10(X) X(10)
#define KV_EACH_12(X) KV_EACH_11(X) X(11)
#define KV_EACH_13(X) KV_EACH_12(X) X(12)
#define KV_EACH_14(X) KV_EACH_13(X) X(13)
#define KV_EACH_15(X) KV_EACH_14(X) X(14)
#define KV_EACH_16(X) KV_EACH_15(X) X(15)
#define KV_EACH_17(X) KV_EACH_16(X) X(16)
#define KV_EACH_18(X) KV_EACH_17(X) X(17)
#define KV_EACH_19(X) KV_EACH_18(X) X(18)
#define KV_EACH_20(X) KV_EACH_19(X) X(19)
#define KV_EACH_21(X) KV_EACH_20(X) X(20)
#define KV_EACH_22(X) KV_EACH_21(X) X(21)
#define KV_EACH_23(X) KV_EACH_22(X) X(22)
#define KV_EACH_24(X) KV_EACH_23(X) X(23)
#define KV_EACH_25(X) KV_EACH_24(X) X(24)
#define KV_EACH_26(X) KV_EACH_25(X) X(25)
#define KV_EACH_27(X) KV_EACH_26(X) X(26)
#define KV_EACH_28(X) KV_EACH_27(X) X(27)
#define KV_EACH_29(X) KV_EACH_28(X) X(28)
#define KV_EACH_30(X) KV_EACH_29(X) X(29)
#define KV_EACH_31(X) KV_EACH_30(X) X(30)
#define KV_EACH_32(X) KV_EACH_31(X) X(31)

#define KV_JOIN_(a, b) a##b
#define KV_JOIN(a, b) KV_JOIN_(a, b)
#define KV_EACH_CHANNEL(X) KV_JOIN(KV_EACH_, KV_CHANNELS)(X)
