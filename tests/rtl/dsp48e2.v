// The part of a DSP48E2 that the array uses: A x (D + B, or D alone) + PCIN or 0, with the register stages of the parameters (UG579).
module DSP48E2 #(
    parameter USE_MULT = "", AMULTSEL = "", BMULTSEL = "", PREADDINSEL = "",
    parameter AREG = 1, ACASCREG = 1, BREG = 1, BCASCREG = 1, MREG = 1, PREG = 1, ADREG = 0, CREG = 0, DREG = 0,
    parameter INMODEREG = 0, OPMODEREG = 0, ALUMODEREG = 0, CARRYINREG = 0, CARRYINSELREG = 0
) (
    input CLK, input signed [29:0] A, input signed [17:0] B, input signed [47:0] PCIN, input [8:0] OPMODE,
    input CEA1, CEA2, CEB1, CEB2, CEM, CEP, CEAD, CEALUMODE, CEC, CECARRYIN, CECTRL, CED, CEINMODE,
    input RSTA, RSTALLCARRYIN, RSTALUMODE, RSTB, RSTC, RSTCTRL, RSTD, RSTINMODE, RSTM, RSTP,
    input signed [26:0] D, input [47:0] C, input [4:0] INMODE, input [3:0] ALUMODE, input CARRYIN, input [2:0] CARRYINSEL,
    output signed [47:0] P, PCOUT
);
    reg signed [26:0] a1, a2, d, ad;
    reg signed [17:0] b2;
    reg [4:0] inmode;
    reg signed [44:0] product;
    reg signed [47:0] sum;
    // INMODE[1] gates port B in front of the pre-adder, INMODE[2] lets port D through.
    wire signed [26:0] preadd = (inmode[2] ? d : 27'sd0) + (inmode[1] ? 27'sd0 : {{9{b2[17]}}, b2});
    wire signed [26:0] added = ADREG ? ad : preadd;
    wire signed [17:0] b = added[17:0];
    wire signed [47:0] z = OPMODE[6:4] == 3'b001 ? PCIN : 48'sd0;
    wire signed [47:0] alu = OPMODE[3:0] == 4'b0101 ? z + product : z;
    always @(posedge CLK) begin
        if (CEA1) a1 <= A[26:0];
        if (CEA2) a2 <= AREG == 2 ? a1 : A[26:0];
        if (CEB2) b2 <= B;
        if (CED) d <= D;
        if (CEINMODE) inmode <= INMODE;
        if (CEAD) ad <= preadd;
        if (CEM) product <= a2 * b;
        if (CEP) sum <= alu;
    end
    assign P = PREG ? sum : alu;
    assign PCOUT = P;
endmodule
